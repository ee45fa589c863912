"""LUFFY (arXiv 2504.14945): the expert trace joins its prompt's rollouts as one more, off-policy sequence.

Its reward counts in the group's baseline: A = R − mean over the K rollouts and the trace, not divided by a standard
deviation. Rollouts have the prompt-only policy loss, tokens of the trace −f(p)·A with f(p) = p/(p + γ), without a clip:
the ratio's denominator, the expert's own probability, is taken as 1, and f keeps the gradient of improbable tokens alive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pact_fast.algorithms.base import (
    TRACE_SETTINGS,
    TURN_SETTINGS,
    Algorithm,
    Group,
    PromptBatch,
    Route,
    StepContext,
    add_rollouts,
    expert_scored,
    token_weight,
)
from pact_fast.algorithms.registry import algorithm
from pact_fast.algorithms.sft import prompt_and_trace
from pact_fast.batch.tree import Node
from pact_fast.components import LossContext
from pact_fast.config import AlgorithmConfig
from pact_fast.errors import PactError
from pact_fast.rewards.advantages import group_advantages


@algorithm("luffy")
class Luffy(Algorithm):
    """GRPO on a group of which the expert trace is a member."""

    turn_advantages = False
    own_section = "luffy"
    unused_settings = {**TRACE_SETTINGS, "reward": TURN_SETTINGS}  # noqa: RUF012

    def __init__(self, config: AlgorithmConfig):
        super().__init__(config)
        refuse_filter(config)

    def prompt_batches(self, groups: Sequence[Group], step: StepContext) -> list[PromptBatch]:
        """x → {τ}, h* for every prompt. With `loss_type: dapo`, tokens of the traces count in the normaliser, too."""
        made = [prompt_and_trace(group, step, final_answer=True) for group in groups]
        (trained,) = step.over_ranks(sum(int(expert.trace.generated.sum()) for _, _, expert in made if expert))
        step = dataclasses.replace(step, sampled_tokens=step.sampled_tokens + trained)
        return [
            self._mixed_group(group, PromptBatch(group, "mixed" if expert else "prompt", [tree], [], expert), x, step)
            for group, (tree, x, expert) in zip(groups, made, strict=True)
        ]

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """`prompt_batches` of one prompt."""
        return self.prompt_batches([group], step.without_reduction())[0]

    def _mixed_group(self, group: Group, batch: PromptBatch, x: Node, step: StepContext) -> PromptBatch:
        """`batch` with the advantages of the whole group, and the weighted tokens of its sequences."""
        rewards = [trajectory.reward for trajectory in group.trajectories]
        if batch.expert is None:
            advantages = group_advantages(rewards, scale=False)
            trained = 0
        else:
            advantages = group_advantages([*rewards, self.config.luffy.expert_reward], scale=False)
            trained = int(batch.expert.trace.generated.sum())
        batch.group = dataclasses.replace(
            group,
            advantages=[
                np.where(trajectory.sampled, a, 0.0).astype(np.float32)
                for trajectory, a in zip(group.trajectories, advantages, strict=False)
            ],
        )
        [tree] = batch.trees
        batch.scored = add_rollouts(batch.group, tree, x, LossContext.PROMPT, 1.0, step, trained)
        if batch.expert is not None and advantages[-1]:
            weight = float(advantages[-1]) * token_weight(group, trained, step, trained)
            batch.scored += expert_scored(batch.group, batch.expert, weight * batch.expert.trace.generated)
        return batch

    def routes(self, with_trace: bool) -> list[Route]:
        """Rollouts, and beside them the trace."""
        expert = {LossContext.EXPERT} if with_trace else set()
        return [Route(1.0, frozenset({LossContext.PROMPT, *expert}))]

    def loss_settings(self) -> dict[str, Any]:
        """Loss settings, with the loss of expert tokens."""
        from pact_fast.kernels.token_losses import shaped  # brings torch, which settings are checked without

        return {**super().loss_settings(), "sft_loss": shaped(self.config.luffy.gamma)}


def refuse_filter(config: AlgorithmConfig) -> None:
    """PactError where dynamic sampling would drop the prompts that no rollout solves: those that the trace is for."""
    if config.filter_groups.enable:
        raise PactError(
            f"algorithm.filter_groups drops prompts that no rollout solves, which algorithm.name={config.name} trains by "
            "their expert traces; remove it"
        )
