"""MatchTIR (arXiv 2601.10712): prompt-only policy loss with turn-level matching rewards and advantages (method, section 3)."""

from __future__ import annotations

from pact_fast.algorithms.base import (
    TRACE_SETTINGS,
    Algorithm,
    Group,
    PromptBatch,
    StepContext,
    add_rollouts,
    prompt_tree,
)
from pact_fast.algorithms.registry import algorithm
from pact_fast.components import LossContext


@algorithm("matchtir")
class MatchTIR(Algorithm):
    """Prompt-only policy loss; turn-level rewards and advantages."""

    unused_settings = TRACE_SETTINGS

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """x → {τ}."""
        tree, x = prompt_tree(group)
        return PromptBatch(group, "prompt", [tree], add_rollouts(group, tree, x, LossContext.PROMPT, 1.0, step))
