"""ToolHop: multi-hop questions over local tools, scored by the final answer (docs/evaluation.md).

Its three scenarios ask the same questions: `direct` without tools, `mandatory` with tools that must be used, and `free` with
tools that may be used. What they ask for is ToolHop's; the words of the instructions are ours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from pact_fast.data.readers import read_tasks
from pact_fast.data.types import Task, text_of
from pact_fast.errors import PactError
from pact_fast.evaluation.benchmark import Benchmark, benchmark

_FORM = (
    "Write dates as YYYY-MM-DD (ISO 8601) and names as first name, then last name. If the answer has a number, write it in "
    "digits, without leading zeros, and write nothing but the number.\n"
    "Give the answer as <answer>your answer</answer>, as short as possible."
)
SCENARIOS = {
    "direct": f"Answer the question at the end with a short answer.\n{_FORM}",
    "mandatory": "Answer the question at the end with a short answer, by means of the tools that you have.\n"
    "Call a tool in every step. Do not use knowledge of your own: the final answer, too, must come from a tool.\n"
    f"{_FORM}",
    "free": "Answer the question at the end with a short answer. You have tools, and may use them.\n" + _FORM,
}


@benchmark("toolhop")
class ToolHop(Benchmark):
    """ToolHop: correctness of the answer within nine turns, by scenario. Needs data.eval=FILE, the dataset's ToolHop.json."""

    categories = tuple(SCENARIOS)
    settings = (
        "env.name=python_tools",
        "data.format=toolhop",
        "rollout.max_turns=9",
        "rollout.max_prompt_length=16384",
    )
    metrics = {"official_success": "official"}  # noqa: RUF012

    def tasks(self, category: str) -> list[Task]:
        return [scenario_task(task, category) for task in self._all]

    @cached_property
    def _all(self) -> list[Task]:
        if not self.config.data.eval:
            raise PactError("toolhop needs its data: add data.eval=FILE, the file ToolHop.json of the dataset")
        return read_tasks(self.config.data.eval, "toolhop")


def scenario_task(task: Task, scenario: str) -> Task:
    """A question of ToolHop in one of its scenarios, with `/scenario` behind its id."""
    *before, question = task.prompt
    text = f"{SCENARIOS[scenario]}\nQuestion: {text_of(question.get('content'))}"
    tools = [] if scenario == "direct" else task.tools
    return replace(task, id=f"{task.id}/{scenario}", prompt=[*before, {**question, "content": text}], tools=tools)
