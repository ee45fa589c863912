"""Tasks of the small helpdesk, made by the rules when a run begins: no files, for the recipe `eigendata-quickstart`.

Every task has passed all controls. Customers are either of training or held out, never both.
"""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from typing import Any

from pact_fast.data.types import Task
from pact_fast.envs.domain.base import make_domain
from pact_fast.envs.domain.env import instance_task
from pact_fast.envs.helpdesk.small import SmallHelpdeskEnvironment
from pact_fast.errors import PactError
from pact_fast.synthesis.eigendata.pipeline import Pipeline, Roles
from pact_fast.synthesis.eigendata.quality import split_of
from pact_fast.synthesis.eigendata.roles import Candidate
from pact_fast.synthesis.eigendata.versions import START, Version

DOMAIN = "helpdesk_small"
MOST_ISSUES = 4


class RulesTasks:
    """A TaskSource of accepted tasks. They are made once; those of a step are drawn from them.

    Args:
        seed: Seed of the tasks.
        count: Tasks to make; one in five is held out.
        max_issues: Most issues of a task.
    """

    def __init__(self, seed: int, count: int, max_issues: int):
        self._seed = seed
        self._halves = _make(seed, count, max_issues)

    def train(self, step: int, count: int) -> list[Task]:
        tasks = self._halves["train"]
        return random.Random(f"eigendata/{self._seed}/{step}").sample(tasks, min(count, len(tasks)))

    def held_out(self, count: int) -> list[Task]:
        return self._halves["held_out"][:count]


@functools.lru_cache(maxsize=2)
def _make(seed: int, count: int, max_issues: int) -> dict[str, list[Task]]:
    """Accepted tasks by half, with the scripted agent's dialogue as their expert trace."""
    domain = make_domain(DOMAIN)
    version = Version.read(START).changed(1, {"workflow.yaml": {"max_issues": max_issues}})
    pipeline = Pipeline(domain, Roles(), seed)
    plans = pipeline.plans(version, 64)
    halves: dict[str, list[Task]] = {"train": [], "held_out": []}
    for slot in range(count):
        candidate = Candidate(1, plans[slot % len(plans)].number, slot, 0, version.number)
        pipeline.attempt(candidate, plans[slot % len(plans)], version)
        if candidate.findings or candidate.instance is None or candidate.rollout is None:
            continue
        task = instance_task(domain, candidate.instance, DOMAIN, candidate.rollout.messages)
        halves[split_of(candidate.instance.subject)].append(replace(task, env=None))
    return halves


class GeneratedHelpdesk(SmallHelpdeskEnvironment):
    """The small helpdesk with tasks of its own: env.name=pact_fast.synthesis.eigendata.generated:GeneratedHelpdesk.

    `env.args`: `count`, tasks to make (default 1000); `max_issues`, most issues of a task (default 2).
    """

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Any:
        return super().factory({k: v for k, v in args.items() if k not in ("count", "max_issues")}, tool_timeout)

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> RulesTasks:
        """PactError for arguments that make no tasks."""
        count, most = args.get("count", 1000), args.get("max_issues", 2)
        if not (type(count) is int and type(most) is int and count >= 10 and 1 <= most <= MOST_ISSUES):
            raise PactError(f"env.args: count must be at least 10, and max_issues within 1..{MOST_ISSUES}")
        return RulesTasks(seed, count, most)
