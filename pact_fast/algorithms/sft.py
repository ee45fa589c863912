"""SFT: mean negative log-likelihood of the tokens that the expert generated (reasoning, calls, visible text)."""

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
from pact_fast.components import Component, LossContext
from pact_fast.errors import PactError


@algorithm("sft")
class SFT(Algorithm):
    """Supervised fine-tuning on expert traces. Samples no rollouts."""

    needs_rollouts = False
    unused_settings = {"trace": None, "anchor": None, "reward": TURN_SETTINGS}  # noqa: RUF012

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """x → h* with all generated tokens supervised. PactError if the task has no expert trace."""
        task = group.task
        if task.expert is None or not task.expert.turns:
            raise PactError(
                f"task {task.id}: algorithm.name=sft needs an expert trace in every row; drop the row or add one"
            )
        tree, x = prompt_tree(group)
        context = step.renderer.trace_context(task, task.expert, "turns")
        h = tree.add(context.ids, x)
        generated = np.isin(context.components, [Component.REASONING, Component.TOOL_CALL, Component.ANSWER])
        scored = score_expert(group, h, context.components, generated.astype(np.float64), 1.0, step)
        return PromptBatch(group, "expert", [tree], [scored] if scored else [], (h, context.components))

    def routes(self, with_trace: bool) -> list[Route]:
        return [Route(1.0, frozenset({LossContext.EXPERT} if with_trace else ()))]
