"""CHORD (arXiv 2508.11408): the prompt-only policy loss and SFT on complete expert traces, mixed by a weight μ.

L = (1 − μ)·L_RL^x + μ·L_SFT-φ,   L_SFT-φ = −mean of sg(φ(p))·log π over the traces' tokens,   φ(p) = p·(1 − p)

φ takes weight from tokens that the policy is sure of, and from those that it finds impossible. μ is a function of the
training step: a linear warm-up from 0 to its peak, then a cosine to its valley. The two losses are means over data of
their own, so a prompt without a trace only adds to the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pact_fast.algorithms.base import (
    TRACE_SETTINGS,
    Algorithm,
    Group,
    PromptBatch,
    Route,
    StepContext,
    add_rollouts,
    expert_scored,
)
from pact_fast.algorithms.registry import algorithm
from pact_fast.algorithms.sft import prompt_and_trace
from pact_fast.components import LossContext
from pact_fast.config import AlgorithmConfig
from pact_fast.config.schema import ChordConfig


@algorithm("chord")
class Chord(Algorithm):
    """GRPO (or MatchTIR's rewards) and φ-weighted SFT, mixed by μ."""

    own_section = "chord"
    unused_settings = TRACE_SETTINGS

    def __init__(self, config: AlgorithmConfig):
        super().__init__(config)
        self.turn_advantages = config.chord.rl == "matchtir"

    def prompt_batches(self, groups: Sequence[Group], step: StepContext) -> list[PromptBatch]:
        """x → {τ} with weight 1 − μ and x → h* with weight μ for every prompt; both normalised by `loss_type`."""
        mu = mu_at(step.step, self.config.chord)
        batches = [self._trees(group, step, mu) for group in groups]
        traces = [batch for batch in batches if batch.expert is not None]
        tokens, count = step.over_ranks(sum(_trained(batch) for batch in traces), len(traces))
        for batch in traces if mu else ():
            assert batch.expert is not None
            weight = mu * trace_token_weight(_trained(batch), tokens, count, step)
            batch.scored += expert_scored(batch.group, batch.expert, weight * batch.expert.trace.generated)
        return batches

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """`prompt_batches` of one prompt: its trace is then all expert data."""
        return self.prompt_batches([group], step.without_reduction())[0]

    def _trees(self, group: Group, step: StepContext, mu: float) -> PromptBatch:
        """The prompt's tree and weighted rollouts; its trace is not scored yet."""
        tree, x, expert = prompt_and_trace(group, step, final_answer=True, shown=mu > 0)
        rollouts = add_rollouts(group, tree, x, LossContext.PROMPT, 1.0 - mu, step)
        return PromptBatch(group, "mixed" if expert else "prompt", [tree], rollouts, expert)

    def schedule(self, step: StepContext) -> dict[str, float]:
        """The weight μ of SFT."""
        return {"schedule/mu": mu_at(step.step, self.config.chord)}

    def routes(self, with_trace: bool) -> list[Route]:
        """Rollouts, and beside them the trace."""
        expert = {LossContext.EXPERT} if with_trace else set()
        return [Route(1.0, frozenset({LossContext.PROMPT, *expert}))]

    def loss_settings(self) -> dict[str, Any]:
        """Loss settings, with the loss of expert tokens."""
        from pact_fast.kernels.token_losses import phi_weighted  # brings torch, which settings are checked without

        phi = {"sft_loss": phi_weighted} if self.config.chord.enable_phi_function else {}
        return {**super().loss_settings(), **phi}


def mu_at(step: int, chord: ChordConfig) -> float:
    """μ of a training step (from 0): linear from 0 to the peak, then a half cosine down to the valley, which it keeps."""
    if step < chord.mu_warmup_steps:
        return chord.mu_peak * step / chord.mu_warmup_steps
    since = step - chord.mu_warmup_steps
    if since >= chord.mu_decay_steps:
        return chord.mu_valley
    cosine = (1.0 + math.cos(math.pi * since / chord.mu_decay_steps)) / 2.0
    return chord.mu_valley + (chord.mu_peak - chord.mu_valley) * cosine


def trace_token_weight(tokens: int, all_tokens: int, traces: int, step: StepContext) -> float:
    """Weight of each token of a trace, by `loss_type`, in a mean over the traces of an optimizer step.

    Args:
        tokens: Trained tokens of the trace.
        all_tokens: Those of all traces of the optimizer step.
        traces: Number of these traces.
        step: The optimizer step.
    """
    if step.config.loss_type == "dapo":
        return 1.0 / all_tokens
    length = step.max_completion_length if step.config.loss_type == "dr_grpo" else tokens
    return 1.0 / (traces * length)


def _trained(batch: PromptBatch) -> int:
    """Trained tokens of the batch's trace."""
    assert batch.expert is not None
    return int(batch.expert.trace.generated.sum())
