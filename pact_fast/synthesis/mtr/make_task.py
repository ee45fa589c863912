"""One QA row to one task of the environment `simulated`, with its verified trace or the reasons why it has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pact_fast.data.types import Task
from pact_fast.envs.simulated.actor import ToolActor
from pact_fast.synthesis.mtr.auto_agent import NoScript, script
from pact_fast.synthesis.mtr.plan import LookupPlan, make_plan
from pact_fast.synthesis.mtr.qa import QARow
from pact_fast.synthesis.mtr.tool_maker import Toolset, make_tools
from pact_fast.synthesis.mtr.verify import MAX_TURNS, rejection_reasons

SYSTEM = "Find the answer with the tools. End with the answer alone, in as few words as possible."


@dataclass(frozen=True)
class MadeTask:
    """The outcome for a row.

    task        with its trace in `expert`, if that is kept
    tools       its tools, and those that were rejected
    task_class  of the question
    reasons     why there is no trace, keys of `verify.REASONS`; empty: there is one
    """

    task: Task
    tools: Toolset
    task_class: str
    reasons: tuple[str, ...]


ToolMaker = Callable[[QARow, LookupPlan], Toolset]


def make_task(
    row: QARow,
    actor: ToolActor,
    max_turns: int = MAX_TURNS,
    system: str = SYSTEM,
    without_plan: ToolMaker = make_tools,
) -> MadeTask:
    """Tools, trace and checks of a row.

    Args:
        row: The row.
        actor: Answers the calls of the trace.
        max_turns: Longest trace that is kept, in assistant turns.
        system: The system prompt of the task.
        without_plan: Makes the tools of a row that has no plan; of the others, the rules do.
    """
    plan = make_plan(row)
    tools = make_tools(row, plan) if plan.hops else without_plan(row, plan)
    task = _task(row, tools, system)
    try:
        trace = script(row, plan, tools, actor.episode(task.id, tools.world, row.answers))
    except NoScript as error:
        return MadeTask(task, tools, plan.task_class, (error.reason,))
    reasons = tuple(rejection_reasons(task, trace, actor, max_turns))
    if not reasons:
        task = replace(task, expert=trace, reference_calls=trace.calls)
    return MadeTask(task, tools, plan.task_class, reasons)


def _task(row: QARow, tools: Toolset, system: str) -> Task:
    """Tools are offered by name: the order in which they were made is that of the plan, and gives it away."""
    return Task(
        id=row.id,
        prompt=[{"role": "system", "content": system}, {"role": "user", "content": row.question}],
        tools=[tools.world.tools[name].schema for name in sorted(tools.world.tools)],
        answer=row.answers[0],
        env="simulated",
        env_args={**tools.world.to_env_args(), "evidence": list(tools.evidence)},
        columns={"answers": list(row.answers)},
    )
