"""ToolHop: multi-hop questions over local tools, scored by the final answer (docs/method.md, section 7)."""

from __future__ import annotations

from pact_fast.data.readers import read_tasks
from pact_fast.data.types import Task
from pact_fast.errors import PactError
from pact_fast.evaluation.benchmark import Benchmark, benchmark


@benchmark("toolhop")
class ToolHop(Benchmark):
    """ToolHop: correctness of the answer within nine turns. Needs data.eval=FILE, the dataset's ToolHop.json."""

    categories = ("toolhop",)
    settings = (
        "env.name=python_tools",
        "data.format=toolhop",
        "rollout.max_turns=9",
        "rollout.max_prompt_length=16384",
    )

    def tasks(self, category: str) -> list[Task]:
        if not self.config.data.eval:
            raise PactError("toolhop needs its data: add data.eval=FILE, the file ToolHop.json of the dataset")
        return read_tasks(self.config.data.eval, "toolhop")
