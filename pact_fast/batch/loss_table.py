"""Supervised tokens: attached to tree nodes (`ScoredTokens`), and as the loss table of a pack (`LossTable`).

The weights include every normaliser (numbers of prompts, rollouts and tokens in the optimizer step), so the losses and
gradients of packs and ranks simply add up, however the batch is split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pact_fast.batch.packing import PackedBatch
from pact_fast.batch.tree import Node
from pact_fast.components import LossContext


@dataclass
class ScoredTokens:
    """The m supervised tokens of one node.

    node                         the node that contains the tokens
    context                      the context under which they are scored
    prompt                       index of the prompt in the step
    rollout                      index of the rollout among those of its prompt; None for the expert trace
    index            int64   [m] indices into node.ids
    component        uint8   [m] `Component` of each token
    advantage        float32 [m]
    rl_weight        float64 [m] weight of the policy loss
    sft_weight       float64 [m] weight of the SFT loss −log π
    sampler_logprob  float32 [m] log-prob (nats) that the rollout engine reported; NaN if unknown
    old_logprob      float32 [m] log-prob before the first optimizer step on the batch; NaN: current policy (ratio 1)
    ref_logprob      float32 [m] log-prob of the reference policy; NaN: no KL term
    importance       float64 [m] importance weight, a factor of rl_weight without gradient; set by the learner
    teacher          the same tokens in another context; their divergence from it enters the loss. None: it does not
    pair_weight      float64 [m] weight of that divergence
    offset                       index of node.ids[0] among the tokens of the rollout; not 0 after a branching
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
    teacher: ScoredTokens | None = None
    pair_weight: np.ndarray = field(default_factory=lambda: np.zeros(0))
    offset: int = 0

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
        offset: int = 0,
    ) -> ScoredTokens:
        """Tokens of a rollout, for the policy loss.

        Args:
            node: The node that contains the rollout's tokens.
            context: PROMPT or TRACE.
            prompt: Index of the prompt in the step.
            rollout: Index of the rollout among those of its prompt.
            index: int64 [m], indices into node.ids.
            component: uint8 [m].
            advantage: float32 [m].
            weight: The rl_weight of all tokens.
            sampler_logprob: float32 [m], NaN where unknown.
            offset: Index of the node's first token among those of the rollout.
        """
        m = len(index)
        return cls(
            node, context, prompt, rollout, index, component, advantage, np.full(m, weight, np.float64),
            np.zeros(m, np.float64), sampler_logprob, _all_nan(m), _all_nan(m), np.ones(m), offset=offset,
        )  # fmt: skip

    @classmethod
    def of_expert(
        cls, node: Node, *, prompt: int, index: np.ndarray, component: np.ndarray, weight: np.ndarray
    ) -> ScoredTokens:
        """Tokens of an expert trace, for the SFT loss.

        Args:
            node: The node that contains the trace.
            prompt: Index of the prompt in the step.
            index: int64 [m], indices into node.ids.
            component: uint8 [m].
            weight: float64 [m], the sft_weight of each token.
        """
        m = len(index)
        return cls(
            node, LossContext.EXPERT, prompt, None, index, component, np.zeros(m, np.float32), np.zeros(m, np.float64),
            weight, _all_nan(m), _all_nan(m), _all_nan(m), np.ones(m),
        )  # fmt: skip


class LossTable(NamedTuple):
    """The columns of `pact_fast.kernels.LossTokens` as numpy arrays [N], N supervised tokens.

    row              int64   hidden row of the pack that predicts the token
    target           int64   token id
    context          int64   `LossContext`
    component        int64   `Component`
    sequence         int64   dense id of the (prompt, rollout, context) that the token belongs to
    advantage        float32
    old_logprob      float32
    rl_weight        float64 importance weights included
    sft_weight       float64
    ref_logprob      float32 None without a reference policy
    sampler_logprob  float32
    """

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
    """Build the loss table of a pack.

    Args:
        batch: The pack.
        scored: Supervised tokens of any nodes; only those of nodes that the pack owns are used.
        reference: Whether the table has a column of reference log-probs.

    Returns:
        The table, and the ScoredTokens whose tokens it has, in its order.
    """
    owned = {id(node) for node in batch.owned}
    selected = [s for s in scored if id(s.node) in owned and len(s.index)]
    lengths = [len(s.index) for s in selected]

    def concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)

    def column(name: str, dtype: type) -> np.ndarray:
        return concatenate([getattr(s, name) for s in selected], dtype)

    def constant(values: list[int]) -> np.ndarray:
        return np.repeat(np.array(values, np.int64), lengths)

    # sequence ids are dense, because they index the rows of per-sequence sums: the k-th distinct key gets id k
    keys = [(s.prompt, s.rollout, s.context) for s in selected]
    ids = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    table = LossTable(
        row=concatenate([batch.rows(s.node)[s.index] for s in selected], np.int64),
        target=concatenate([s.node.ids[s.index] for s in selected], np.int64),
        context=constant([int(s.context) for s in selected]),
        component=column("component", np.int64),
        sequence=constant([ids[key] for key in keys]),
        advantage=column("advantage", np.float32),
        old_logprob=column("old_logprob", np.float32),
        rl_weight=column("rl_weight", np.float64) * column("importance", np.float64),
        sft_weight=column("sft_weight", np.float64),
        ref_logprob=column("ref_logprob", np.float32) if reference else None,
        sampler_logprob=column("sampler_logprob", np.float32),
    )
    return table, selected


def teacher_pairs(selected: Sequence[ScoredTokens]) -> tuple[np.ndarray, np.ndarray]:
    """(index int64 [M, 2], weight float64 [M]): places of tokens and their teachers' in the table of a pack.

    `selected` is what `build_loss_table` returned with the table. A pack has both or neither (`TokenTree.pair`).
    """
    ends = np.cumsum([0, *(len(s.index) for s in selected)])
    place = {id(s): np.arange(a, b) for s, a, b in zip(selected, ends[:-1], ends[1:], strict=True)}
    index, weight = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
    for s in selected:
        if s.teacher is not None:
            index.append(np.stack([place[id(s)], place[id(s.teacher)]], 1))
            weight.append(s.pair_weight)
    return np.concatenate(index), np.concatenate(weight)


def _all_nan(m: int) -> np.ndarray:
    return np.full(m, np.nan, np.float32)
