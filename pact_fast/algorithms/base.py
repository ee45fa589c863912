"""The protocol of an algorithm: the rollouts of one prompt become token trees with a weight on every supervised token.

Weights already hold every normaliser (number of prompts in the optimizer step, rollouts, tokens), so the losses and
gradients of packs and micro-batches simply add up, however the batch is split. The learner knows no algorithm: what an
algorithm needs beyond weighted tokens, it says in `Requirements`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.batch.tree import Node, TokenTree
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import LossContext
from pact_fast.config import AlgorithmConfig
from pact_fast.data.types import Task, Trajectory


@dataclass
class Group:
    """One prompt of a step, its rollouts and their token advantages (float32, one per response token)."""

    task: Task
    prompt_index: int  # place of the prompt in the step
    prompt_ids: np.ndarray
    trajectories: list[Trajectory] = field(default_factory=list)
    advantages: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class StepContext:
    """What an algorithm knows of the optimizer step: its place in the schedule, and the normalisers of its batch.

    horizon         steps of the whole run, the default annealing horizon
    prompts         prompts of the optimizer step
    sampled_tokens  over all rollouts of the optimizer step
    """

    config: AlgorithmConfig
    renderer: ChatRenderer
    seed: int
    step: int
    horizon: int
    prompts: int
    sampled_tokens: int
    max_completion_length: int


@dataclass
class PromptBatch:
    """The token trees of one prompt, and the supervised tokens in them.

    route   prompt | trace | blend | expert: the contexts in use, for metrics and the viewer
    expert  the node of h* and the component of each of its tokens, for the viewer
    """

    group: Group
    route: str
    trees: list[TokenTree]
    scored: list[ScoredTokens]
    expert: tuple[Node, np.ndarray] | None = None


@dataclass(frozen=True)
class ImportanceWeight:
    """Stop-gradient weight w = π_old/π_sampler on the policy terms of one loss context.

    level     token: one w per token; sequence: one per rollout, the product over its tokens (as in TRL);
              geometric_mean: one per rollout, the geometric mean over its tokens
    bound     truncate: min(clip_max, w); mask: w, or 0 above clip_max
    clip_max  the bound
    """

    level: Literal["token", "sequence", "geometric_mean"]
    bound: Literal["truncate", "mask"]
    clip_max: float

    @property
    def in_loss(self) -> bool:
        """The loss kernel forms this weight itself (`is_cap`); others need a pass for π_old before the update."""
        return self.level == "token" and self.bound == "truncate"


@dataclass(frozen=True)
class Requirements:
    """What an algorithm needs of the learner beyond weighted tokens.

    importance  importance weights by loss context
    reference   log-probs of the frozen reference policy (KL term)
    """

    importance: Mapping[LossContext, ImportanceWeight] = field(default_factory=dict)
    reference: bool = False

    @property
    def old_logprob(self) -> bool:
        """Some weight is not formed by the loss, so π_old is computed before the first optimizer step of a batch."""
        return any(not weight.in_loss for weight in self.importance.values())

    @property
    def is_cap(self) -> dict[LossContext, float] | None:
        """`is_cap` of pact_loss: the weights that the loss forms itself."""
        return {context: w.clip_max for context, w in self.importance.items() if w.in_loss} or None


class Route(NamedTuple):
    """A way in which a prompt may be trained, for estimates before a run.

    fraction  of the prompts
    contexts  contexts of the rollouts; EXPERT stands for a supervised trace
    """

    fraction: float
    contexts: frozenset[LossContext]


class Algorithm:
    """Base class. Subclasses implement `prompt_batch`, and register with `@algorithm("name")`.

    needs_rollouts   False: no rollouts are sampled, and groups have no trajectories
    turn_advantages  turn-level matching rewards and advantages; False: outcome reward and group advantage only
    """

    needs_rollouts = True
    turn_advantages = True

    def __init__(self, config: AlgorithmConfig):
        self.config = config

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """Trees and weighted tokens of one prompt. Must not depend on anything random but (step.seed, step.step, group)."""
        raise NotImplementedError

    def schedule(self, step: StepContext) -> dict[str, float]:
        """Annealed quantities, for the metrics."""
        return {}

    def requirements(self, sampler_differs: bool) -> Requirements:
        """What the learner has to prepare.

        Args:
            sampler_differs: Rollouts come from other kernels or older weights than the learner's (vLLM), so prompt-only
                terms are corrected as `vllm_importance_sampling_*` says.
        """
        config = self.config
        importance = {}
        if sampler_differs and config.vllm_importance_sampling_correction:
            level, _, bound = config.vllm_importance_sampling_mode.partition("_")
            importance[LossContext.PROMPT] = ImportanceWeight(
                level, bound, config.vllm_importance_sampling_clip_max  # type: ignore[arg-type]
            )  # fmt: skip
        return Requirements(importance, reference=config.beta > 0)

    def routes(self, with_trace: bool) -> list[Route]:
        """Expected routes of the prompts, for estimates; `with_trace`: tasks have expert traces."""
        return [Route(1.0, frozenset({LossContext.PROMPT}))]

    def loss_settings(self) -> dict[str, Any]:
        """Keyword arguments of pact_loss that follow from the configuration."""
        config = self.config
        return {
            "policy_loss": config.policy_loss,
            "clip": (config.epsilon, config.epsilon_high or config.epsilon),
            "delta": config.delta,
            "kl_coef": config.beta,
            "entropy_coef": config.entropy_coef,
        }


def prompt_tree(group: Group) -> tuple[TokenTree, Node]:
    """A tree with the prompt as its root."""
    tree = TokenTree()
    return tree, tree.add(group.prompt_ids)


def add_rollouts(
    group: Group, tree: TokenTree, parent: Node, context: LossContext, weight: float, step: StepContext
) -> list[ScoredTokens]:
    """Add every rollout as a child of `parent`, and weight its generated tokens.

    Args:
        weight: Of the prompt's policy loss, for example 1 − q.
    """
    return [
        score_rollout(group, k, tree.add(trajectory.ids, parent), context, weight, step)
        for k, trajectory in enumerate(group.trajectories)
    ]


def score_rollout(
    group: Group, k: int, node: Node, context: LossContext, weight: float, step: StepContext
) -> ScoredTokens:
    """The generated tokens of rollout k, which stands in `node`, with `weight` times the weight of `loss_type`."""
    trajectory = group.trajectories[k]
    index = np.flatnonzero(trajectory.sampled)
    if step.config.mask_truncated_completions and trajectory.stop_reason.is_truncated:
        weight = 0.0
    return ScoredTokens.of_rollout(
        node, context, prompt=group.prompt_index, rollout=k, index=index, component=trajectory.components[index],
        advantage=group.advantages[k][index], weight=weight * _token_weight(group, len(index), step),
        sampler_logprob=trajectory.logprobs[index],
    )  # fmt: skip


def score_expert(
    group: Group, node: Node, components: np.ndarray, token_weights: np.ndarray, weight: float, step: StepContext
) -> ScoredTokens | None:
    """Expert tokens with component-aware weights; None if nothing is supervised (Z = 0).

    Args:
        token_weights: [n], m_n of the method.
        weight: Of the prompt's SFT loss, for example (1 − q)·coef.
    """
    index = np.flatnonzero(token_weights)
    if not len(index):
        return None
    normaliser = token_weights.sum() if step.config.sft.normalizer == "weighted" else len(index)
    weights = weight * token_weights[index] / (normaliser * step.prompts)
    return ScoredTokens.of_expert(
        node, prompt=group.prompt_index, index=index, component=components[index], weight=weights
    )


def _token_weight(group: Group, tokens: int, step: StepContext) -> float:
    """Weight of one of a rollout's `tokens` generated tokens, by loss_type."""
    rollouts = step.prompts * len(group.trajectories)
    if step.config.loss_type == "dapo":
        return 1.0 / max(step.sampled_tokens, 1)
    if step.config.loss_type == "dr_grpo":
        return 1.0 / (rollouts * step.max_completion_length)
    return 1.0 / (rollouts * max(tokens, 1))
