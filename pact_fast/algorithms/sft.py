"""SFT: mean negative log-likelihood of the tokens that the expert generated (reasoning, calls, visible text).

With `sft.final_answer`, the final answer and the reasoning before it, too.
"""

from __future__ import annotations

import numpy as np

from pact_fast.algorithms.base import (
    TURN_SETTINGS,
    Algorithm,
    Group,
    PromptBatch,
    Route,
    StepContext,
    prompt_tree,
    score_expert,
)
from pact_fast.algorithms.branches import ExpertNodes, add_branches
from pact_fast.algorithms.registry import algorithm
from pact_fast.batch.tree import Node, TokenTree
from pact_fast.components import LossContext
from pact_fast.config import AlgorithmConfig
from pact_fast.data.types import Task
from pact_fast.errors import PactError


@algorithm("sft")
class SFT(Algorithm):
    """Supervised fine-tuning on expert traces. Samples no rollouts."""

    needs_rollouts = False
    unused_settings = {"trace": None, "anchor": None, "reward": TURN_SETTINGS}  # noqa: RUF012

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """x → h* with all generated tokens supervised. PactError if the task has no expert trace."""
        return sft_batch(group, step, step.config.sft.final_answer)

    def routes(self, with_trace: bool) -> list[Route]:
        return [Route(1.0, frozenset({LossContext.EXPERT} if with_trace else ()))]


def sft_batch(group: Group, step: StepContext, final_answer: bool, weight: float = 1.0) -> PromptBatch:
    """x → h* with all generated tokens supervised. PactError if the task has no expert trace.

    Args:
        group: The prompt.
        step: Normalisers of the optimizer step.
        final_answer: Complete traces, with their final answers.
        weight: Weight of the loss.
    """
    if not has_trace(group.task):
        raise missing_trace(group.task, step.config)
    tree, _, expert = prompt_and_trace(group, step, final_answer)
    assert expert is not None
    scored = score_expert(group, expert, expert.trace.generated.astype(np.float64), weight, step)
    return PromptBatch(group, "expert", [tree], scored, expert)


def missing_trace(task: Task, config: AlgorithmConfig) -> PactError:
    """The error for a task without an expert trace."""
    return PactError(
        f"task {task.id}: algorithm.name={config.name} needs an expert trace in every row; drop the row or add one"
    )


def has_trace(task: Task) -> bool:
    """Whether there is an expert trace with a turn before its answer."""
    return task.expert is not None and bool(task.expert.turns)


def prompt_and_trace(
    group: Group, step: StepContext, final_answer: bool, shown: bool = True
) -> tuple[TokenTree, Node, ExpertNodes | None]:
    """(tree of x and of the expert trace after it, node in which x ends, the trace; None if there is none).

    Args:
        group: The prompt; its rollouts may follow x, too.
        step: Gives the renderer.
        final_answer: Complete the trace with its final answer, if it has one.
        shown: False: leave the trace out.
    """
    task = group.task
    if task.expert is None or not has_trace(task) or not shown:
        return *prompt_tree(group), None
    trace = step.renderer.trace_context(task, task.expert, "turns", answer=final_answer)
    tree, x = prompt_tree(group, trace)
    return tree, x, ExpertNodes(add_branches(tree, x, trace), trace)
