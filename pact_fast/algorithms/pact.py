"""PACT (arXiv 2606.16215; method, section 2): trace-conditioned policy loss, component-aware SFT, prompt-only anchoring.

L = (1 − z)·(L_RL^h + β·L_SFT) + z·L_RL^x,   z ~ Bernoulli(q) per prompt and step   (gate)
the same with z = q                                                                  (blend)
"""

from __future__ import annotations

import dataclasses
import random
from typing import Literal

import numpy as np

from pact_fast.algorithms.base import (
    Algorithm,
    Group,
    ImportanceWeight,
    PromptBatch,
    Requirements,
    Route,
    StepContext,
    add_rollouts,
    prompt_tree,
    score_expert,
)
from pact_fast.algorithms.branches import ExpertNodes, add_branches, add_context, rewound
from pact_fast.algorithms.registry import algorithm
from pact_fast.batch.tree import Node, TokenTree
from pact_fast.chat.segments import reasoning_level_at, sft_lambda
from pact_fast.chat.trace_context import TraceContext
from pact_fast.components import Component, LossContext


@algorithm("pact")
class Pact(Algorithm):
    """Privileged trace co-training: trace-conditioned policy loss and SFT on the trace, anchored by prompt-only rollouts."""

    unused_settings = {"sft": ("final_answer",)}  # noqa: RUF012

    def schedule(self, step: StepContext) -> dict[str, float]:
        """SFT weight λ of tool-call tokens, and the level of the reasoning prefix."""
        sft, horizon = self.config.sft, sft_horizon(step)
        return {
            "schedule/sft_lambda": sft_lambda(step.step, horizon, sft.lambda_start, sft.lambda_end),
            "schedule/reasoning_level": float(
                reasoning_level_at(step.step, horizon, sft.reasoning_level_start, sft.reasoning_level_end)
            ),
        }

    def requirements(self, sampler_differs: bool) -> Requirements:
        """Adds the context importance weight min(clip, π(τ|x,h*)/π(τ|x)) of the trace-conditioned terms."""
        base, trace = super().requirements(sampler_differs), self.config.trace
        if trace.context_importance_weight == "none":
            return base
        level: Literal["token", "geometric_mean"] = (
            "token" if trace.context_importance_weight == "token" else "geometric_mean"
        )
        weight = ImportanceWeight(level, "truncate", trace.context_importance_weight_clip)
        return dataclasses.replace(base, importance={**base.importance, LossContext.TRACE: weight})

    def routes(self, with_trace: bool) -> list[Route]:
        """Gate: a fraction q of the prompts is prompt-only. Blend: both contexts for every prompt."""
        prompt, trace = frozenset({LossContext.PROMPT}), frozenset({LossContext.TRACE, LossContext.EXPERT})
        if not with_trace:
            return [Route(1.0, prompt)]
        q = self.config.anchor.q
        if self.config.anchor.mode == "blend":
            return [Route(1.0, prompt | trace)]
        return [Route(q, prompt), Route(1.0 - q, trace)]

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """x → {τ} with weight z, and x → h* → {τ} with SFT on h* with weight 1 − z."""
        z = prompt_only_weight(group, step)
        trace = self._trace(group, step) if z < 1 else None
        tree, x = prompt_tree(group, trace)
        batch = PromptBatch(group, {0.0: "trace", 1.0: "prompt"}.get(z, "blend"), [tree], [])
        if trace:
            self._add_trace_branch(batch, tree, x, trace, 1 - z, step)
        if z > 0:
            batch.scored += add_rollouts(group, tree, x, LossContext.PROMPT, z, step)
        return batch

    def _trace(self, group: Group, step: StepContext) -> TraceContext:
        """The trace as it is rendered in this step. Without SFT, only the branch that rollouts follow."""
        rendering = self.config.trace.rendering
        assert group.task.expert is not None
        trace = step.renderer.trace_context(
            group.task, group.task.expert, "turns" if rendering == "hint" else rendering, self._cut(step)
        )
        return trace if self.config.sft.coef else trace.last_branch()

    def _level(self, step: StepContext) -> int:
        """Level of the active reasoning prefix."""
        sft = self.config.sft
        return reasoning_level_at(step.step, sft_horizon(step), sft.reasoning_level_start, sft.reasoning_level_end)

    def _cut(self, step: StepContext) -> int | None:
        """Level at which the reasoning of the trace is cut; None: all of it is shown."""
        return self._level(step) if self.config.trace.reasoning == "level" else None

    def _add_trace_branch(
        self, batch: PromptBatch, tree: TokenTree, x: Node, trace: TraceContext, weight: float, step: StepContext
    ) -> None:
        """Add weight·(L_RL^h + β·L_SFT) to `batch`.

        With the renderings `demonstration` and `turns`, SFT supervises h* where it is part of the rollouts' context. With
        `hint`, the context is a tree of its own, and h* is a branch for SFT alone. Where h* itself branches, SFT supervises
        each token in its own branch, and rollouts follow the last one.
        """
        group, task = batch.group, batch.group.task
        tail = rewound(group.trajectories)
        expert = ExpertNodes(add_branches(tree, x, trace, tail), trace)
        batch.expert, parent = expert, expert.pieces[-1].node
        weights = sft_weights(trace, self._level(step), step)
        batch.scored += score_expert(group, expert, weights, weight * self.config.sft.coef, step)
        if self.config.trace.rendering == "hint":
            assert task.expert is not None
            tree = TokenTree()
            parent = add_context(tree, step.renderer.hint_prompt_ids(task, task.expert, self._cut(step)), None, tail)
            batch.trees.append(tree)
        batch.scored += add_rollouts(group, tree, parent, LossContext.TRACE, weight, step)


def prompt_only_weight(group: Group, step: StepContext) -> float:
    """z, the weight of the prompt-only route: a coin (gate) or q (blend); 1 for a prompt without an expert trace."""
    anchor = step.config.anchor
    if group.task.expert is None or not group.task.expert.turns:
        return 1.0
    if anchor.mode == "blend":
        return anchor.q
    coin = random.Random(f"gate/{step.seed}/{step.step}/{group.prompt_index}").random()
    return 1.0 if coin < anchor.q else 0.0


def sft_horizon(step: StepContext) -> int:
    """Annealing horizon S in training steps."""
    return step.config.sft.horizon or step.horizon


def sft_weights(context: TraceContext, level: int, step: StepContext) -> np.ndarray:
    """SFT weights m_n of the trace's tokens, float64 [n]: 1 in the active reasoning prefix, λ in tool calls, else 0.

    Args:
        context: The rendered trace.
        level: Level of the active reasoning prefix.
        step: Gives λ.
    """
    sft = step.config.sft
    weights = np.zeros(len(context.ids), np.float64)
    weights[(context.components == Component.REASONING) & (context.level <= level)] = 1.0
    weights[(context.components == Component.TOOL_CALL) & context.generated] = sft_lambda(
        step.step, sft_horizon(step), sft.lambda_start, sft.lambda_end
    )
    return weights
