"""Quality of a data set: near-duplicates, diversity, difficulty, coverage, and leakage between its two splits."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pact_fast.envs.domain import Domain, Instance
from pact_fast.synthesis.eigendata.compose import seed_of
from pact_fast.synthesis.eigendata.rollout import REFERENCE_POLICIES, ScriptedPlayer
from pact_fast.synthesis.eigendata.versions import Version

HELD_OUT = 0.2  # of the subjects
ROLLOUTS = 4  # per reference policy and instance
_WORD = re.compile(r"\w+")


class Similarity:
    """Finds near-duplicates: tasks with the same issues whose openings share most of their words.

    Args:
        limit: Jaccard similarity of the words, above which a task is a duplicate.
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._words: dict[frozenset[str], list[tuple[str, frozenset[str]]]] = defaultdict(list)
        self._digests: dict[str, str] = {}

    def add(self, instance: Instance) -> None:
        self._digests[instance.digest] = instance.id
        self._words[frozenset(instance.issues)].append((instance.id, opening_words(instance)))

    def duplicate_of(self, instance: Instance) -> str | None:
        """Id of a task that this one repeats; None: there is none."""
        if instance.digest in self._digests:
            return self._digests[instance.digest]
        mine = opening_words(instance)
        for other, words in self._words[frozenset(instance.issues)]:
            # the same words about another customer are the same task only where nothing else could differ
            if jaccard(mine, words) > self._limit:
                return other
        return None


def opening_words(instance: Instance) -> frozenset[str]:
    """Words that tell the task from others: those of the opening, and the arguments of the gold calls."""
    arguments = " ".join(str(value) for step in instance.gold for value in step.arguments.values())
    return frozenset(_WORD.findall(f"{instance.user.opening} {arguments}".lower()))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a ∩ b| / |a ∪ b|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a or b else 1.0


@dataclass(frozen=True)
class Diversity:
    """Diversity statistics of a set of tasks.

    combinations  distinct sets of issues
    call_paths    distinct sequences of gold tools
    entropy       of the distribution of call paths, in bits
    subjects      distinct subjects
    nearest       mean similarity of a task's words to the most similar other task of a sample, in [0, 1]
    """

    combinations: int
    call_paths: int
    entropy: float
    subjects: int
    nearest: float


def diversity(instances: Sequence[Instance], sample: int = 200) -> Diversity:
    """Diversity of a data set. `sample`: tasks whose nearest neighbour is looked for."""
    paths = Counter(tuple(step.name for step in instance.gold) for instance in instances)
    total = max(paths.total(), 1)
    words = [opening_words(instance) for instance in instances[:sample]]
    nearest = [
        max((jaccard(mine, other) for j, other in enumerate(words) if j != i), default=0.0)
        for i, mine in enumerate(words)
    ]
    return Diversity(
        combinations=len({frozenset(instance.issues) for instance in instances}),
        call_paths=len(paths),
        entropy=-sum(n / total * math.log2(n / total) for n in paths.values()),
        subjects=len({instance.subject for instance in instances}),
        nearest=sum(nearest) / max(len(nearest), 1),
    )


def coverage(domain: Domain, instances: Iterable[Instance]) -> dict[str, int]:
    """Gold calls per tool, of agent and user; tools that no task needs have 0."""
    counts = Counter(step.name for instance in instances for step in instance.gold)
    return {name: counts[name] for name in [*domain.agent, *domain.user]}


def pass_rates(domain: Domain, instance: Instance, version: Version, rollouts: int = ROLLOUTS) -> dict[str, float]:
    """Pass rate of every reference policy on a task: scripted agents with errors, the same for every data set.

    Args:
        domain: The domain.
        instance: The task.
        version: Gives the user's settings.
        rollouts: Dialogues per policy.

    Returns:
        {policy: rate from 0 to 1}.
    """
    rates = {}
    for name, errors in REFERENCE_POLICIES.items():
        player = ScriptedPlayer(errors)
        rng = random.Random(seed_of("difficulty", name, instance.id))
        passed = sum(player.play(domain, instance, version, rng).passed for _ in range(rollouts))
        rates[name] = passed / rollouts
    return rates


def split_of(subject: str, held_out: float = HELD_OUT) -> str:
    """`train` or `held_out`, by the subject alone: no entity is in both."""
    number = int.from_bytes(hashlib.sha256(f"split/{subject}".encode()).digest()[:8], "big")
    return "held_out" if number / 2**64 < held_out else "train"


@dataclass(frozen=True)
class Leakage:
    """Overlap of the two splits, which should be empty: task ids, equal tasks, entities of the database."""

    ids: tuple[str, ...]
    tasks: tuple[str, ...]
    entities: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.ids or self.tasks or self.entities)


def leakage(domain: Domain, train: Sequence[Instance], held_out: Sequence[Instance]) -> Leakage:
    """Find the overlap of train and held-out tasks."""

    def common(a: Iterable[str], b: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(set(a) & set(b)))

    known = {key for table in domain.base.values() for key in table}
    return Leakage(
        common((i.id for i in train), (i.id for i in held_out)),
        common((i.digest for i in train), (i.digest for i in held_out)),
        common(
            (entity for i in train for entity in entities(i, known)),
            (entity for i in held_out for entity in entities(i, known)),
        ),
    )


def entities(instance: Instance, known: set[str]) -> set[str]:
    """Keys of the database that a task mentions, in its initial state, its calls or its words."""
    values = [edit.key for edit in instance.init]
    values += [str(value) for step in instance.gold for value in step.arguments.values()]
    values += [str(value) for item in instance.checker.assertions for value in item.arguments.values()]
    values += _WORD.findall(instance.user.opening)
    return {value for value in values if value in known} | {instance.subject} & known
