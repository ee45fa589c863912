"""What an algorithm is: it turns the rollouts of one prompt into token trees with a weight on every supervised token.

Weights already hold every normaliser (number of prompts in the optimizer step, rollouts, tokens), so the losses and
gradients of packs and micro-batches simply add up, however the batch is split.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from pact_fast.config import AlgorithmConfig
from pact_fast.data.rendering import ChatRenderer
from pact_fast.data.types import Task, Trajectory
from pact_fast.kernels.tokens import LossTokens, Stream
from pact_fast.tree import Node, PackedBatch, TokenTree


@dataclass
class Group:
    """One prompt of a step, its rollouts and their token advantages (float32, one per response token)."""

    task: Task
    index: int  # place of the prompt in the step
    prompt_ids: np.ndarray
    trajectories: list[Trajectory] = field(default_factory=list)
    advantages: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Update:
    """What one optimizer step knows: the place in the schedule and the normalisers of its batch."""

    config: AlgorithmConfig
    renderer: ChatRenderer
    seed: int
    step: int
    horizon: int
    prompts: int
    sampled_tokens: int  # over all rollouts of the optimizer step
    max_completion_length: int


@dataclass
class Scored:
    """Supervised tokens of one node: positions `index` [m] within node.ids, one value each in the arrays [m]."""

    node: Node
    stream: Stream
    sequence: int
    index: np.ndarray
    component: np.ndarray
    advantage: np.ndarray
    rl_weight: np.ndarray
    sft_weight: np.ndarray
    sampler_logprob: np.ndarray
    old_logprob: np.ndarray
    ref_logprob: np.ndarray


@dataclass
class Plan:
    """The trees of one prompt and what is supervised in them."""

    group: Group
    route: str  # prompt | trace | blend | expert
    trees: list[TokenTree]
    scored: list[Scored]
    expert: tuple[Node, np.ndarray] | None = None  # where h* stands, and the component of each of its tokens


def rollout_scored(group: Group, k: int, node: Node, stream: Stream, share: float, update: Update) -> Scored:
    """The generated tokens of rollout k, in `node`, weighted by `share` of the prompt's policy loss."""
    trajectory = group.trajectories[k]
    index = np.flatnonzero(trajectory.sampled)
    m = len(index)
    weight = share * _token_weight(group, m, update)
    if update.config.mask_truncated_completions and trajectory.stop_reason.startswith("max_"):
        weight = 0.0
    return Scored(
        node=node,
        stream=stream,
        sequence=2 * (group.index * len(group.trajectories) + k) + (stream == Stream.TRACE),
        index=index,
        component=trajectory.components[index],
        advantage=group.advantages[k][index],
        rl_weight=np.full(m, weight, np.float64),
        sft_weight=np.zeros(m, np.float64),
        sampler_logprob=trajectory.logprobs[index],
        old_logprob=np.full(m, np.nan, np.float32),
        ref_logprob=np.full(m, np.nan, np.float32),
    )


def _token_weight(group: Group, tokens: int, update: Update) -> float:
    """Weight of one of a rollout's `tokens` generated tokens, by loss_type."""
    rollouts = update.prompts * len(group.trajectories)
    if update.config.loss_type == "dapo":
        return 1.0 / max(update.sampled_tokens, 1)
    if update.config.loss_type == "dr_grpo":
        return 1.0 / (rollouts * update.max_completion_length)
    return 1.0 / (rollouts * max(tokens, 1))


def expert_scored(
    group: Group, node: Node, components: np.ndarray, mask: np.ndarray, share: float, update: Update
) -> Scored | None:
    """Expert tokens with component-aware weights `mask` [n] (m_n of the method); None when nothing is supervised (Z = 0)."""
    index = np.flatnonzero(mask)
    if not len(index):
        return None
    normaliser = mask.sum() if update.config.sft.normalizer == "weighted" else len(index)
    m = len(index)
    nan = np.full(m, np.nan, np.float32)
    return Scored(
        node=node,
        stream=Stream.EXPERT,
        sequence=-1 - group.index,
        index=index,
        component=components[index],
        advantage=np.zeros(m, np.float32),
        rl_weight=np.zeros(m, np.float64),
        sft_weight=share * mask[index] / (normaliser * update.prompts),
        sampler_logprob=nan,
        old_logprob=nan,
        ref_logprob=nan,
    )


def prompt_tree(group: Group) -> tuple[TokenTree, Node]:
    tree = TokenTree()
    return tree, tree.add(group.prompt_ids)


def add_rollouts(
    group: Group, tree: TokenTree, parent: Node, stream: Stream, share: float, update: Update
) -> list[Scored]:
    """Hang every rollout under `parent` and score it there."""
    return [
        rollout_scored(group, k, tree.add(trajectory.ids, parent), stream, share, update)
        for k, trajectory in enumerate(group.trajectories)
    ]


def loss_tokens(
    batch: PackedBatch, scored: Iterable[Scored], *, reference: bool = False
) -> tuple[LossTokens, list[Scored]]:
    """The loss table of a pack, and the scored nodes in its order. Nodes owned by other packs are left to them."""
    owned = {id(node) for node in batch.owned}
    here = [s for s in scored if id(s.node) in owned and len(s.index)]

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        parts = [getattr(s, name) for s in here]
        return torch.as_tensor(np.concatenate(parts) if parts else np.zeros(0), dtype=dtype)

    def constant(values: list[int]) -> torch.Tensor:
        return torch.as_tensor(np.repeat(np.array(values, np.int64), [len(s.index) for s in here]))

    rows = [batch.rows(s.node)[s.index] for s in here]
    targets = [s.node.ids[s.index] for s in here]
    # sequence ids must be dense; the k-th distinct id gets number k
    numbers = {sequence: i for i, sequence in enumerate(dict.fromkeys(s.sequence for s in here))}
    tokens = LossTokens(
        row=torch.as_tensor(np.concatenate(rows) if rows else np.zeros(0, np.int64)),
        target=torch.as_tensor(np.concatenate(targets) if targets else np.zeros(0, np.int64)),
        stream=constant([int(s.stream) for s in here]),
        component=column("component", torch.int64),
        sequence=constant([numbers[s.sequence] for s in here]),
        advantage=column("advantage", torch.float32),
        old_logprob=column("old_logprob", torch.float32),
        rl_weight=column("rl_weight", torch.float64),
        sft_weight=column("sft_weight", torch.float64),
        ref_logprob=column("ref_logprob", torch.float32) if reference else None,
        sampler_logprob=column("sampler_logprob", torch.float32),
    )
    return tokens, here


class Algorithm:
    """Base of all algorithms."""

    needs_rollouts = True
    turn_advantages = True  # turn-level rewards and advantages; otherwise outcome reward and group advantage only

    def __init__(self, config: AlgorithmConfig):
        self.config = config

    def plan(self, group: Group, update: Update) -> Plan:
        raise NotImplementedError

    def schedule(self, update: Update) -> dict[str, float]:
        """What is annealed, for the metrics."""
        return {}
