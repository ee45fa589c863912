"""The held-out tasks of the small helpdesk, those of `eigendata-quickstart` with the same seed (docs/eigendata.md)."""

from __future__ import annotations

from pact_fast.data.types import Task
from pact_fast.envs.registry import make_tasks
from pact_fast.evaluation.benchmark import Benchmark, benchmark

ALL = 10_000  # all of them


@benchmark("helpdesk-small")
class HelpdeskSmall(Benchmark):
    """Tasks of a small helpdesk, made from the seed, about customers that training never sees."""

    categories = ("held_out",)
    settings = (
        "env.name=pact_fast.synthesis.eigendata.generated:GeneratedHelpdesk",
        "env.args={count: 600, max_issues: 2}",
    )
    metrics = {  # noqa: RUF012
        "user_protocol_break": "protocol breaks",
        "user_premature_stop": "premature stops",
        "user_leak": "leaks",
    }

    def tasks(self, category: str) -> list[Task]:
        return make_tasks(self.config).held_out(ALL)
