"""Multi-hop questions about invented people and places, made from a seed: the environment `simulated` without data.

Facts are drawn for each question and cannot be memorised. A row has the form of 2Wiki's: a question, triples that
answer it, further triples that give tools which lead astray. ToolMaker and AutoAgent make a task of it as of any other row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pact_fast.data.types import Task
from pact_fast.envs.simulated.env import Simulated, make_actor
from pact_fast.errors import PactError
from pact_fast.synthesis.mtr.auto_agent import script
from pact_fast.synthesis.mtr.make_task import MadeTask, make_task
from pact_fast.synthesis.mtr.plan import make_plan
from pact_fast.synthesis.mtr.qa import QARow, Triple

SYSTEM = "Use the tools."
# relation -> kind of its subject, kind of its object
RELATIONS = {
    "mother": ("person", "person"), "teacher": ("person", "person"), "friend": ("person", "person"),
    "city": ("person", "place"), "school": ("person", "place"), "mayor": ("place", "person"),
    "founder": ("place", "person"), "rival": ("place", "place"), "birth": ("person", "year"),
    "opening": ("place", "year"),
}  # fmt: skip
_PEOPLE = """ada ben bert cleo cora dean dora elsa emil finn fred gina greta hans hugo iris jack kira lena liam mona nils olga
    paul rita sven tess ugo vera will"""
_PLACES = """alba bree cove dale elm fjord glen hythe isle kirk lund moor nook oban pell quay rye skye tarn usk vale wick
    york zell"""
PEOPLE = tuple(f"@{name.capitalize()}" for name in _PEOPLE.split())
PLACES = tuple(f"@{name.capitalize()}" for name in _PLACES.split())
NAMED = ("person", "place")  # entities of a chain and its end; no years, which have more tokens and are harder to copy
TOKENS = {"person": PEOPLE, "place": PLACES, "year": tuple(str(year) for year in range(1900, 2000))}


@dataclass(frozen=True)
class Shape:
    """Shape of generated questions.

    hops         least and most relations of a chain
    distractors  relations offered beyond those of the question
    comparison   probability of a question that compares two chains
    early_stop   probability, after every look-up of a chain but the last, that a trace for training answers with what it has
                 found so far: a weak teacher, whose traces are not filtered by their answers
    """

    hops: tuple[int, int] = (2, 3)
    distractors: int = 2
    comparison: float = 0.0
    early_stop: float = 0.0


def make_row(rng: random.Random, row_id: str, shape: Shape) -> QARow:
    """A question with its facts."""
    compares = rng.random() < shape.comparison
    length = rng.randint(*shape.hops)
    relations = _chain(rng, length, ("year",) if compares else NAMED)
    kinds = [RELATIONS[relation] for relation in relations]
    ends = rng.sample(TOKENS[kinds[0][0]], 2 if compares else 1)
    used = set(ends)
    triples: list[Triple] = []
    fronts = list(ends)
    for relation, (_, kind) in zip(relations, kinds, strict=True):
        values = rng.sample([token for token in TOKENS[kind] if token not in used], len(fronts))
        used.update(values)
        triples += [(at, relation, value) for at, value in zip(fronts, values, strict=True)]
        fronts = values
    other = _distractors(
        rng, [t for triple in triples for t in (triple[0], triple[2])], set(relations), shape.distractors
    )
    words = " of the ".join(reversed(relations))
    if compares:
        earlier = rng.random() < 0.5
        question = f"Which has the {'earlier' if earlier else 'later'} {words}, {ends[0]} or {ends[1]}?"
        answer = ends[0] if (int(fronts[0]) < int(fronts[1])) == earlier else ends[1]
    else:
        question, answer = f"Who or what is the {words} of {ends[0]}?", fronts[0]
    kind = "comparison" if compares else "compositional"
    return QARow(row_id, question, (answer,), triples=tuple(triples), other_facts=tuple(other), type=kind)


def _chain(rng: random.Random, length: int, last: Sequence[str]) -> list[str]:
    """Relations that fit one after the other, each once; the last one leads to something of a kind in `last`."""
    while True:
        chain: list[str] = []
        kind = rng.choice(("person", "place"))
        for place in range(length):
            final = place == length - 1
            fitting = [
                relation
                for relation, (start, end) in RELATIONS.items()
                if start == kind and relation not in chain and end in (last if final else NAMED)
            ]
            if not fitting:
                break
            chain.append(rng.choice(fitting))
            kind = RELATIONS[chain[-1]][1]
        else:
            return chain


def _distractors(rng: random.Random, names: list[str], needed: set[str], count: int) -> list[Triple]:
    """Facts of other relations about the same entities."""
    relations = rng.sample([relation for relation in RELATIONS if relation not in needed], count)
    facts: list[Triple] = []
    for relation in relations:
        start, end = RELATIONS[relation]
        subjects = [name for name in dict.fromkeys(names) if name in TOKENS[start]] or [rng.choice(TOKENS[start])]
        facts += [(subject, relation, rng.choice([t for t in TOKENS[end] if t not in names])) for subject in subjects]
    return facts


class GeneratedQuestionTasks:
    """A TaskSource of questions by index. The text of a question decides whether it is held out: one in eight is."""

    def __init__(self, shape: Shape, seed: int):
        self._shape, self._seed, self._actor = shape, seed, make_actor({})

    def train(self, step: int, count: int) -> list[Task]:
        return [self._task("train", index) for index in range(step * count, (step + 1) * count)]

    def held_out(self, count: int) -> list[Task]:
        return [self._task("eval", index) for index in range(count)]

    def _task(self, split: str, index: int) -> Task:
        rng = random.Random(f"mtr/{self._seed}/{split}/{index}")
        while True:
            row = make_row(rng, f"mtr-{split}-{self._seed}-{index}", self._shape)
            if (sum(row.question.encode()) % 8 == 0) == (split == "eval"):
                made = make_task(row, self._actor, system=SYSTEM)
                if not made.reasons:
                    return (
                        self._with_training_trace(row, made, rng) if split == "train" else replace(made.task, env=None)
                    )

    def _with_training_trace(self, row: QARow, made: MadeTask, rng: random.Random) -> Task:
        """The task with the trace of a teacher that may stop too early."""
        plan = make_plan(row)
        hops = len(plan.hops) if plan.entities else 1
        while hops < len(plan.hops) and rng.random() >= self._shape.early_stop:
            hops += 1
        if hops == len(plan.hops):
            return replace(made.task, env=None)
        episode = self._actor.episode(made.task.id, made.tools.world, row.answers)
        trace = script(row, replace(plan, hops=plan.hops[:hops]), made.tools, episode)
        return replace(made.task, env=None, expert=trace, reference_calls=trace.calls)


class GeneratedQuestions(Simulated):
    """`simulated` with tasks of its own: env.name=pact_fast.synthesis.mtr.generated:GeneratedQuestions.

    `env.args`: those of `simulated`, and `hops`, `distractors`, `comparison`, `early_stop` (`Shape`).
    """

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Simulated]:
        return super().factory({k: v for k, v in args.items() if k not in Shape.__dataclass_fields__}, tool_timeout)

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> GeneratedQuestionTasks:
        """PactError for a shape that cannot be drawn."""
        given = {k: v for k, v in args.items() if k in Shape.__dataclass_fields__}
        shape = Shape(**(given | ({"hops": tuple(given["hops"])} if isinstance(given.get("hops"), list) else {})))
        try:
            low, high = shape.hops
            fits = 1 <= low <= high <= 4 and 0 <= shape.distractors <= 5
            fits = fits and 0 <= shape.comparison <= 1 and 0 <= shape.early_stop < 1
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise PactError(
                "env.args: hops must be [low, high] within 1..4, distractors within 0..5, comparison in [0, 1], early_stop in "
                "[0, 1)"
            )
        return GeneratedQuestionTasks(shape, seed)
