"""BFCL v4: multi-turn and single-turn Python categories of the installed package bfcl-eval (docs/bfcl.md)."""

from __future__ import annotations

from pact_fast.data.types import Task
from pact_fast.envs.bfcl.entries import CATEGORIES, MULTI_TURN, REFUSED, entries
from pact_fast.envs.bfcl.env import check_format
from pact_fast.envs.bfcl.tasks import is_held_out, make_task
from pact_fast.evaluation.benchmark import Benchmark, CategoryGroup, Split, benchmark


@benchmark("bfcl")
class BfclBenchmark(Benchmark):
    """BFCL v4: multi_turn_*, simple_python, multiple, parallel, parallel_multiple, irrelevance, live_*."""

    categories = CATEGORIES
    refused = REFUSED
    settings = (
        "env.name=bfcl",
        "rollout.max_turns=200",
        "rollout.max_prompt_length=16384",
        "rollout.max_completion_length=16384",
    )
    groups = (
        CategoryGroup("multi_turn", MULTI_TURN),
        CategoryGroup("non_live_ast", ("simple_python", "multiple", "parallel", "parallel_multiple")),
        CategoryGroup(
            "live_ast", ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"), by="task"
        ),
        CategoryGroup("irrelevance_detection", ("irrelevance", "live_irrelevance")),
    )

    def tasks(self, category: str) -> list[Task]:
        return [make_task(found, self._format) for found in entries(category).values()]

    def rows(self, category: str, split: Split) -> list[Task]:
        """With expert traces; the split is that of `is_held_out`."""
        chosen = [
            found
            for found in entries(category).values()
            if split == "all" or is_held_out(found.id) == (split == "test")
        ]
        return [make_task(found, self._format, expert=True) for found in chosen]

    @property
    def _format(self) -> str:
        return check_format(self.config.env.args.get("format", "json"))
