"""Base class of algorithms: turns the rollouts of one prompt into token trees with a weight on every supervised token.

Weights include every normaliser (prompts in the optimizer step, rollouts, tokens), so losses and gradients of packs and
ranks simply add up, however the batch is split. The learner knows no algorithm: needs beyond weighted tokens are
stated in `Requirements`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from pact_fast.algorithms.branches import ExpertNodes, Piece, add_branches, add_context, rewound
from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.batch.tree import Node, TokenTree
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.trace_context import TraceContext
from pact_fast.components import LossContext
from pact_fast.config import AlgorithmConfig
from pact_fast.data.types import Task, Trajectory


@dataclass
class Group:
    """One prompt of a step and its rollouts.

    task          the task behind the prompt
    prompt_index  position of the prompt in the step
    prompt_ids    int64 [p] tokens of the prompt
    trajectories  its rollouts
    advantages    float32 [n] for each rollout, one value per response token
    """

    task: Task
    prompt_index: int
    prompt_ids: np.ndarray
    trajectories: list[Trajectory] = field(default_factory=list)
    advantages: list[np.ndarray] = field(default_factory=list)


def _own_counts(*counts: int) -> tuple[int, ...]:
    """Sums over a single rank."""
    return counts


@dataclass(frozen=True)
class StepContext:
    """The state of an optimizer step, for an algorithm: its position in the schedule, and the normalisers of its batch.

    config                 the algorithm's settings
    renderer               renders expert traces
    seed                   of the run
    step                   training step, from 0
    horizon                training steps of the run, the default annealing horizon
    prompts                prompts of the optimizer step
    sampled_tokens         sampled tokens of all its rollouts
    max_completion_length  limit of a rollout, the normaliser of `loss_type: dr_grpo`
    over_ranks             sums counts over the ranks, for normalisers of `Algorithm.prompt_batches`; all ranks must call it
    """

    config: AlgorithmConfig
    renderer: ChatRenderer
    seed: int
    step: int
    horizon: int
    prompts: int
    sampled_tokens: int
    max_completion_length: int
    over_ranks: Callable[..., tuple[int, ...]] = _own_counts

    def without_reduction(self) -> StepContext:
        """The same step for a caller that the other ranks do not join: its counts are not summed."""
        return replace(self, over_ranks=_own_counts)


@dataclass
class PromptBatch:
    """The token trees of one prompt and the supervised tokens in them.

    group   the prompt
    route   prompt, trace, blend, expert or mixed (rollouts given x, beside the expert trace): the contexts in use, for
            metrics and the viewer
    trees   token trees
    scored  supervised tokens of their nodes
    expert  the expert trace, for the viewer
    """

    group: Group
    route: str
    trees: list[TokenTree]
    scored: list[ScoredTokens]
    expert: ExpertNodes | None = None


@dataclass(frozen=True)
class ImportanceWeight:
    """Stop-gradient weight w = π_old/π_sampler on the policy terms of one loss context.

    level     token: one w per token; sequence: one per rollout, the product over its tokens (as in TRL);
              geometric_mean: one per rollout, the geometric mean over its tokens
    bound     truncate: min(clip_max, w); mask: w up to clip_max, 0 above
    clip_max  the bound
    """

    level: Literal["token", "sequence", "geometric_mean"]
    bound: Literal["truncate", "mask"]
    clip_max: float

    @property
    def in_loss(self) -> bool:
        """The loss kernel computes this weight itself (`importance_cap`). Others need π_old before the update."""
        return self.level == "token" and self.bound == "truncate"


SAMPLER_CORRECTIONS: dict[str, tuple[Literal["token", "sequence"], Literal["truncate", "mask"]]] = {
    "token_truncate": ("token", "truncate"),
    "token_mask": ("token", "mask"),
    "sequence_truncate": ("sequence", "truncate"),
    "sequence_mask": ("sequence", "mask"),
}  # vllm_importance_sampling_mode → level and bound


@dataclass(frozen=True)
class Requirements:
    """Requirements of an algorithm on the learner, beyond weighted tokens.

    importance  importance weight of each loss context that has one
    reference   log-probs of the frozen reference policy are needed (KL term)
    divergence  tokens with a `teacher` have this divergence from it in the loss (`TokenPairs`); None: no token has one
    """

    importance: Mapping[LossContext, ImportanceWeight] = field(default_factory=dict)
    reference: bool = False
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] | None = None

    @property
    def old_logprob(self) -> bool:
        """A weight is not computed by the loss, so π_old is needed before the first optimizer step of a batch."""
        return any(not weight.in_loss for weight in self.importance.values())

    @property
    def importance_cap(self) -> dict[LossContext, float] | None:
        """Argument `importance_cap` of pact_loss: caps of the weights that the loss computes itself, by context."""
        return {context: w.clip_max for context, w in self.importance.items() if w.in_loss} or None


class Route(NamedTuple):
    """One way in which prompts are trained, for estimates before a run.

    fraction  expected fraction of the prompts
    contexts  loss contexts of their rollouts; EXPERT: the expert trace is supervised
    """

    fraction: float
    contexts: frozenset[LossContext]


TRACE_SETTINGS: Mapping[str, Collection[str] | None] = {
    "trace": None,
    "anchor": None,
    "sft": None,
}  # read by PACT, and `sft` in part by SFT
TURN_SETTINGS = ("gamma", "advantage_combine")  # of the section `reward`
OWN_SECTIONS = ("sft_then_rl", "chord", "luffy", "hpt", "sdft")  # each read by the algorithm of that name alone


class Algorithm:
    """Base class. Subclasses implement `prompt_batch` (or `prompt_batches`) and register with `@algorithm("name")`.

    needs_rollouts   False: no rollouts are sampled in any step, groups have no trajectories
    needs_rewards    False: rewards of rollouts do not enter the loss
    needs_traces     True: every task must have an expert trace, in steps with rollouts, too
    turn_advantages  True: turn-level matching rewards and advantages; False: outcome reward and group advantage only
    unused_settings  sections of AlgorithmConfig that are not read, with names of keys (None: the whole section); for a
                     note at the start of a run
    own_section      the one of OWN_SECTIONS that is read; None: none
    """

    needs_rollouts = True
    needs_rewards = True
    needs_traces = False
    turn_advantages = True
    unused_settings: ClassVar[Mapping[str, Collection[str] | None]] = {}
    own_section: ClassVar[str | None] = None

    def __init__(self, config: AlgorithmConfig):
        self.config = config

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """Trees and weighted tokens of one prompt. Random choices may depend on (step.seed, step.step, group) only."""
        raise NotImplementedError

    def prompt_batches(self, groups: Sequence[Group], step: StepContext) -> list[PromptBatch]:
        """The batches of this rank's prompts in an optimizer step, in order; `prompt_batch` of each.

        Override this where a normaliser counts what other prompts train on, beside `step.sampled_tokens`. Each rank is called
        once for the step, with its own prompts (perhaps none), so pass such counts through `step.over_ranks`.
        """
        return [self.prompt_batch(group, step) for group in groups]

    def samples(self, step: int) -> bool:
        """Whether rollouts are sampled in training step `step` (from 0). A step without them needs expert traces."""
        return self.needs_rollouts

    def schedule(self, step: StepContext) -> dict[str, float]:
        """Current values of annealed quantities, for the metrics. Keys begin with "schedule/"."""
        return {}

    def requirements(self, sampler_differs: bool) -> Requirements:
        """The algorithm's requirements on the learner.

        Args:
            sampler_differs: Rollouts come from other kernels or older weights than the learner's (vLLM). Prompt-only
                policy terms then get the importance weight of `vllm_importance_sampling_*`.
        """
        config = self.config
        importance = {}
        if sampler_differs and config.vllm_importance_sampling_correction:
            level, bound = SAMPLER_CORRECTIONS[config.vllm_importance_sampling_mode]
            importance[LossContext.PROMPT] = ImportanceWeight(level, bound, config.vllm_importance_sampling_clip_max)
        return Requirements(importance, reference=config.beta > 0)

    def routes(self, with_trace: bool) -> list[Route]:
        """Expected routes of the prompts, for estimates before a run. `with_trace`: tasks have expert traces."""
        return [Route(1.0, frozenset({LossContext.PROMPT}))]

    def loss_settings(self) -> dict[str, Any]:
        """Keyword arguments of pact_loss, from the settings."""
        config = self.config
        return {
            "policy_loss": config.policy_loss,
            "clip": (config.epsilon, config.epsilon_high or config.epsilon),
            "delta": config.delta,
            "kl_coef": config.beta,
            "entropy_coef": config.entropy_coef,
        }


def prompt_tree(group: Group, trace: TraceContext | None = None) -> tuple[TokenTree, Node]:
    """A tree with the prompt as its root, and the node in which the prompt ends; its rollouts and `trace` may follow it."""
    tree, traces = TokenTree(), [trace] if trace else []
    return tree, add_context(tree, group.prompt_ids, None, rewound([*group.trajectories, *traces]))


def add_rollouts(
    group: Group,
    tree: TokenTree,
    parent: Node,
    context: LossContext,
    weight: float,
    step: StepContext,
    expert_tokens: int = 0,
) -> list[ScoredTokens]:
    """Add every rollout as a child of `parent` and weight its sampled tokens.

    A rollout with branches becomes several nodes, and has one ScoredTokens for each of them with sampled tokens.

    Args:
        group: The prompt.
        tree: The tree that `parent` belongs to.
        parent: The end of the context in which the rollouts are scored, from `prompt_tree` or `add_context`.
        context: Name of that context in the loss.
        weight: Weight of the prompt's policy loss, for example 1 − q.
        step: Normalisers of the optimizer step.
        expert_tokens: See `token_weight`.
    """
    return [
        scored
        for k, trajectory in enumerate(group.trajectories)
        for scored in score_rollout(
            group, k, add_branches(tree, parent, trajectory), context, weight, step, expert_tokens
        )
    ]


def score_rollout(
    group: Group,
    k: int,
    pieces: Sequence[Piece],
    context: LossContext,
    weight: float,
    step: StepContext,
    expert_tokens: int = 0,
) -> list[ScoredTokens]:
    """The sampled tokens of rollout `k`, weighted by `loss_type`.

    Args:
        group: The prompt.
        k: Index of the rollout.
        pieces: The rollout's nodes.
        context: Loss context.
        weight: Weight of the prompt's policy loss.
        step: Normalisers of the optimizer step.
        expert_tokens: See `token_weight`.
    """
    trajectory = group.trajectories[k]
    index = np.flatnonzero(trajectory.sampled)
    if step.config.mask_truncated_completions and trajectory.stop_reason.is_truncated:
        weight = 0.0
    weight *= token_weight(group, len(index), step, expert_tokens)
    parts = [(piece, piece.own(index)) for piece in pieces]
    return [
        ScoredTokens.of_rollout(
            piece.node, context, prompt=group.prompt_index, rollout=k, index=own - piece.offset,
            component=trajectory.components[own], advantage=group.advantages[k][own], weight=weight,
            sampler_logprob=trajectory.logprobs[own], offset=piece.offset,
        )
        for piece, own in parts
        if len(own) or len(pieces) == 1
    ]  # fmt: skip


def score_expert(
    group: Group, expert: ExpertNodes, token_weights: np.ndarray, weight: float, step: StepContext
) -> list[ScoredTokens]:
    """Weighted tokens of the expert trace, one ScoredTokens for each node that has some; none if all weights are 0 (Z = 0).

    Args:
        group: The prompt.
        expert: The trace.
        token_weights: float64 [n], m_n of the method, for each of its tokens.
        weight: Weight of the prompt's SFT loss, for example (1 − q)·coef.
        step: Normalisers of the optimizer step.
    """
    total = token_weights.sum() if step.config.sft.normalizer == "weighted" else np.count_nonzero(token_weights)
    return expert_scored(group, expert, weight * token_weights / (total * step.prompts)) if total else []


def expert_scored(group: Group, expert: ExpertNodes, weights: np.ndarray) -> list[ScoredTokens]:
    """The tokens of the expert trace that have an SFT weight: weights float64 [n]."""
    index = np.flatnonzero(weights)
    parts = [(piece, own) for piece in expert.pieces if len(own := piece.own(index))]
    return [
        ScoredTokens.of_expert(
            piece.node, prompt=group.prompt_index, index=own - piece.offset, component=expert.trace.components[own],
            weight=weights[own],
        )
        for piece, own in parts
    ]  # fmt: skip


def token_weight(group: Group, tokens: int, step: StepContext, expert_tokens: int = 0) -> float:
    """Weight of each token of a sequence with `tokens` trained tokens, by `loss_type`.

    Args:
        group: The prompt; its rollouts are its sequences.
        tokens: Trained tokens of the sequence.
        step: Normalisers of the optimizer step.
        expert_tokens: Trained tokens of the expert trace where it is one of the prompt's sequences; 0: it is not.
    """
    if step.config.loss_type == "prompt_mean":
        of_prompt = sum(int(t.sampled.sum()) for t in group.trajectories) + expert_tokens
        return 1.0 / (step.prompts * max(of_prompt, 1))
    if step.config.loss_type == "dapo":
        return 1.0 / max(step.sampled_tokens, 1)
    sequences = step.prompts * (len(group.trajectories) + (expert_tokens > 0))
    if step.config.loss_type == "dr_grpo":
        return 1.0 / (sequences * step.max_completion_length)
    return 1.0 / (sequences * max(tokens, 1))
