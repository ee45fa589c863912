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
from pact_fast.algorithms.registry import algorithm
from pact_fast.batch.tree import Node, TokenTree
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import Component, LossContext
from pact_fast.config import AlgorithmConfig
from pact_fast.data.types import ExpertTrace, Task
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
    task = group.task
    if not has_trace(task):
        raise missing_trace(task, step.config)
    tree, x = prompt_tree(group)
    h, components = add_trace(group, tree, x, step, final_answer)
    weights = generated(components).astype(np.float64)
    scored = score_expert(group, h, components, weights, weight, step)
    return PromptBatch(group, "expert", [tree], [scored] if scored else [], (h, components))


def missing_trace(task: Task, config: AlgorithmConfig) -> PactError:
    """The error for a task without an expert trace."""
    return PactError(
        f"task {task.id}: algorithm.name={config.name} needs an expert trace in every row; drop the row or add one"
    )


def has_trace(task: Task) -> bool:
    """Whether there is an expert trace with a turn before its answer."""
    return task.expert is not None and bool(task.expert.turns)


def add_trace(group: Group, tree: TokenTree, x: Node, step: StepContext, final_answer: bool) -> tuple[Node, np.ndarray]:
    """Add the expert trace after x; returns its node and the component of each of its tokens, uint8 [n]."""
    assert group.task.expert is not None
    ids, components = expert_tokens(step.renderer, group.task, group.task.expert, final_answer)
    return tree.add(ids, x), components


def expert_tokens(
    renderer: ChatRenderer, task: Task, trace: ExpertTrace, final_answer: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [n], components uint8 [n]) of a trace after its prompt. `final_answer`: with its answer, if it has one."""
    body = renderer.trace_context(task, trace, "turns")
    if not final_answer or trace.answer is None:
        return body.ids, body.components
    ids, components = renderer.assistant_turn(trace.answer_reasoning, trace.answer, [])
    return np.concatenate([body.ids, ids]), np.concatenate([body.components, components])


def generated(components: np.ndarray) -> np.ndarray:
    """Which tokens the expert generated, bool [n]: reasoning, calls and visible text, and never an observation."""
    return np.isin(components, [Component.REASONING, Component.TOOL_CALL, Component.ANSWER])
