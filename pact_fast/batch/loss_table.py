"""Supervised tokens of tree nodes, and the table of a pack: one row per supervised token, as `LossTokens` has it.

Weights already hold every normaliser (number of prompts in the optimizer step, rollouts, tokens), so the losses and
gradients of packs and ranks simply add up, however the batch is split.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pact_fast.batch.packing import PackedBatch
from pact_fast.batch.tree import Node
from pact_fast.components import LossContext


@dataclass
class ScoredTokens:
    """Supervised tokens of one node, m of them.

    node                     the node they stand in
    context                  under which context they are scored
    prompt                   place of the prompt in the step
    rollout                  number of the rollout of that prompt; None for the expert trace
    index            int64   [m] positions within node.ids
    component        uint8   [m] see Component
    advantage        float32 [m]
    rl_weight        float64 [m] weight of the policy loss
    sft_weight       float64 [m] weight of −log π
    sampler_logprob  float32 [m] NaN where unknown
    old_logprob      float32 [m] NaN: the current policy (ratio 1)
    ref_logprob      float32 [m] NaN: no KL term
    importance       float64 [m] stop-gradient factor of rl_weight, filled in by the learner where one is needed
    """

    node: Node
    context: LossContext
    prompt: int
    rollout: int | None
    index: np.ndarray
    component: np.ndarray
    advantage: np.ndarray
    rl_weight: np.ndarray
    sft_weight: np.ndarray
    sampler_logprob: np.ndarray
    old_logprob: np.ndarray
    ref_logprob: np.ndarray
    importance: np.ndarray

    @classmethod
    def of_rollout(
        cls,
        node: Node,
        context: LossContext,
        *,
        prompt: int,
        rollout: int,
        index: np.ndarray,
        component: np.ndarray,
        advantage: np.ndarray,
        weight: float,
        sampler_logprob: np.ndarray,
    ) -> ScoredTokens:
        """Tokens of a policy loss, all of one `weight`."""
        m = len(index)
        return cls(
            node, context, prompt, rollout, index, component, advantage, np.full(m, weight, np.float64),
            np.zeros(m, np.float64), sampler_logprob, _unknown(m), _unknown(m), np.ones(m),
        )  # fmt: skip

    @classmethod
    def of_expert(
        cls, node: Node, *, prompt: int, index: np.ndarray, component: np.ndarray, weight: np.ndarray
    ) -> ScoredTokens:
        """Tokens of an SFT loss; weight [m]."""
        m = len(index)
        return cls(
            node, LossContext.EXPERT, prompt, None, index, component, np.zeros(m, np.float32), np.zeros(m, np.float64),
            weight, _unknown(m), _unknown(m), _unknown(m), np.ones(m),
        )  # fmt: skip


class LossTable(NamedTuple):
    """The columns of `pact_fast.kernels.LossTokens` as numpy arrays [N]."""

    row: np.ndarray
    target: np.ndarray
    context: np.ndarray
    component: np.ndarray
    sequence: np.ndarray
    advantage: np.ndarray
    old_logprob: np.ndarray
    rl_weight: np.ndarray
    sft_weight: np.ndarray
    ref_logprob: np.ndarray | None
    sampler_logprob: np.ndarray


def build_loss_table(
    batch: PackedBatch, scored: Iterable[ScoredTokens], *, reference: bool = False
) -> tuple[LossTable, list[ScoredTokens]]:
    """The loss table of a pack, and the ScoredTokens in its order.

    Args:
        batch: The pack.
        scored: Supervised tokens of any nodes; those of nodes that other packs own are left to them.
        reference: Whether the table has reference log-probs.
    """
    owned = {id(node) for node in batch.owned}
    here = [s for s in scored if id(s.node) in owned and len(s.index)]
    lengths = [len(s.index) for s in here]

    def concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)

    def column(name: str, dtype: type) -> np.ndarray:
        return concatenate([getattr(s, name) for s in here], dtype)

    def constant(values: list[int]) -> np.ndarray:
        return np.repeat(np.array(values, np.int64), lengths)

    # sequence ids are dense: the k-th distinct (prompt, rollout, context) gets number k
    keys = [(s.prompt, s.rollout, s.context) for s in here]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    table = LossTable(
        row=concatenate([batch.rows(s.node)[s.index] for s in here], np.int64),
        target=concatenate([s.node.ids[s.index] for s in here], np.int64),
        context=constant([int(s.context) for s in here]),
        component=column("component", np.int64),
        sequence=constant([numbers[key] for key in keys]),
        advantage=column("advantage", np.float32),
        old_logprob=column("old_logprob", np.float32),
        rl_weight=column("rl_weight", np.float64) * column("importance", np.float64),
        sft_weight=column("sft_weight", np.float64),
        ref_logprob=column("ref_logprob", np.float32) if reference else None,
        sampler_logprob=column("sampler_logprob", np.float32),
    )
    return table, here


def _unknown(m: int) -> np.ndarray:
    return np.full(m, np.nan, np.float32)
