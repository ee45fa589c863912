"""FTRL: tools as Python sources, scored by the sub-questions that the calls solve (docs/method.md, section 7)."""

from __future__ import annotations

from functools import cached_property

from pact_fast.data.prompt_format import format_prompt
from pact_fast.data.readers import read_tasks
from pact_fast.data.types import Task
from pact_fast.errors import PactError
from pact_fast.evaluation.benchmark import Benchmark, CategoryGroup, benchmark
from pact_fast.text import short

KINDS = ("single_hop", "parallel_single_hop", "multi_hop", "parallel_multi_hop")


@benchmark("ftrl")
class Ftrl(Benchmark):
    """FTRL: solve-P, solve-R and solve-F1 by kind of question. Needs data.eval=FILE, the dataset's parquet file."""

    categories = KINDS
    settings = ("env.name=python_tools", "data.format=ftrl", "rollout.max_prompt_length=16384")
    metrics = {  # noqa: RUF012
        "solve_p": "solve-P",
        "solve_r": "solve-R",
        "solve_f1": "solve-F1",
        "answer_correct": "answer",
        "official_solve_p": "official P",
        "official_solve_r": "official R",
        "official_solve_f1": "official F1",
    }
    groups = (CategoryGroup("overall", KINDS, by="task"),)

    def tasks(self, category: str) -> list[Task]:
        return [task for task in self._all if _kind(task) == category]

    @cached_property
    def _all(self) -> list[Task]:
        if not self.config.data.eval:
            raise PactError("ftrl needs its data: add data.eval=FILE, a parquet or JSONL file of FTRL")
        tasks = read_tasks(self.config.data.eval, "ftrl")
        return [format_prompt(task, self.config.data.prompt_format) for task in tasks]


def _kind(task: Task) -> str:
    """The kind of question, from the column `data_source`: `self/multi_hop` or `multi_hop`."""
    source = str(task.columns.get("data_source", ""))
    kind = source.removeprefix("self/")
    if kind not in KINDS:
        raise PactError(f"task {task.id}: data_source is {short(source)}; expected one of {', '.join(KINDS)}")
    return kind
