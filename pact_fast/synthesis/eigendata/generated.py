"""Tasks of the small helpdesk, made by the rules when a run begins: no files, for the recipe `eigendata-quickstart`.

Every task has passed all controls. Customers are either of training or held out, never both. The dialogues for SFT are those of
a scripted agent that may stop too early, so that SFT on them leaves room for RL.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

from pact_fast.data.types import Message, Task
from pact_fast.envs.domain import Domain, Instance
from pact_fast.envs.domain.base import make_domain
from pact_fast.envs.domain.env import instance_task
from pact_fast.envs.helpdesk.small import SmallHelpdeskEnvironment
from pact_fast.errors import PactError
from pact_fast.synthesis.eigendata.pipeline import Pipeline, Roles
from pact_fast.synthesis.eigendata.quality import split_of
from pact_fast.synthesis.eigendata.roles import Candidate
from pact_fast.synthesis.eigendata.rollout import AgentErrors, ScriptedPlayer
from pact_fast.synthesis.eigendata.versions import START, Version

DOMAIN = "helpdesk_small"
MAX_ISSUES = 4
TASK_ARGS = ("count", "max_issues", "early_stop")


class RulesTasks:
    """A TaskSource of accepted tasks. They are made once; those of a step are drawn from them.

    Args:
        seed: Seed of the tasks.
        count: Tasks to make; one in five is held out.
        max_issues: Most issues of a task.
        early_stop: Probability, for every step of the scripted agent, that it says instead that all is done.
    """

    def __init__(self, seed: int, count: int, max_issues: int, early_stop: float = 0.0):
        self._seed = seed
        self._splits = _make(seed, count, max_issues, early_stop)

    def train(self, step: int, count: int) -> list[Task]:
        tasks = self._splits["train"]
        return random.Random(f"eigendata/{self._seed}/{step}").sample(tasks, min(count, len(tasks)))

    def held_out(self, count: int) -> list[Task]:
        return self._splits["held_out"][:count]


@functools.lru_cache(maxsize=2)
def _make(seed: int, count: int, max_issues: int, early_stop: float) -> dict[str, list[Task]]:
    """Accepted tasks by split, with the scripted agent's dialogue as their expert trace."""
    domain = make_domain(DOMAIN)
    version = Version.read(START).changed(1, {"workflow.yaml": {"max_issues": max_issues}})
    pipeline = Pipeline(domain, Roles(), seed)
    plans = pipeline.plans(version, 64)
    splits: dict[str, list[Task]] = {"train": [], "held_out": []}
    for slot in range(count):
        candidate = Candidate(1, plans[slot % len(plans)].number, slot, 0, version.number)
        pipeline.attempt(candidate, plans[slot % len(plans)], version)
        if candidate.findings or candidate.instance is None or candidate.rollout is None:
            continue
        messages = candidate.rollout.messages
        if early_stop:
            messages = _dialogue_with_early_stop(
                domain, candidate.instance, version, early_stop, random.Random(f"{seed}/{slot}")
            )
        task = instance_task(domain, candidate.instance, DOMAIN, messages)
        splits[split_of(_customer(candidate.instance))].append(replace(task, env=None))
    return splits


def _customer(instance: Instance) -> str:
    """A handle and an account, drawn at random for every task. Each single word occurs in training."""
    return " ".join((instance.subject, *instance.user.knows.values()))


def _dialogue_with_early_stop(
    domain: Domain, instance: Instance, version: Version, early_stop: float, rng: random.Random
) -> list[Message]:
    """A dialogue of an agent that may stop too early, but not before its first question is answered."""
    player = ScriptedPlayer(AgentErrors(stop=early_stop))
    while True:
        messages = player.play(domain, instance, version, rng).messages
        if sum(message["role"] == "assistant" for message in messages) > 1:
            return messages


class GeneratedHelpdesk(SmallHelpdeskEnvironment):
    """The small helpdesk with tasks of its own: env.name=pact_fast.synthesis.eigendata.generated:GeneratedHelpdesk.

    `env.args`: `count`, tasks to make (default 600); `max_issues`, most issues of a task (default 2); `early_stop`, of the
    dialogues for SFT (default 0).
    """

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Any:
        return super().factory({k: v for k, v in args.items() if k not in TASK_ARGS}, tool_timeout)

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> RulesTasks:
        """PactError for arguments that make no tasks."""
        count, most, stop = args.get("count", 600), args.get("max_issues", 2), args.get("early_stop", 0.0)
        numbers = type(count) is int and type(most) is int and type(stop) in (int, float)
        if not (numbers and count >= 10 and 1 <= most <= MAX_ISSUES and 0 <= stop < 1):
            raise PactError(
                f"env.args: count must be at least 10, max_issues within 1..{MAX_ISSUES}, early_stop within [0, 1)"
            )
        return RulesTasks(seed, count, most, stop)
