"""PACT (method, section 2): trace-conditioned policy loss + component-aware SFT, anchored to the prompt alone.

L = (1 − z)·(L_RL^h + β·L_SFT) + z·L_RL^x,   z ~ Bernoulli(q) per prompt and step   (gate)
the same with z = q                                                                  (blend)
"""

from __future__ import annotations

import random

import numpy as np

from pact_fast.algorithms.base import Algorithm, Group, Plan, Update, add_rollouts, expert_scored, prompt_tree
from pact_fast.data.rendering import TraceContext
from pact_fast.data.segments import lambda_at, level_at
from pact_fast.data.types import Component
from pact_fast.kernels.tokens import Stream
from pact_fast.tree import Node, TokenTree


class Pact(Algorithm):
    def schedule(self, update: Update) -> dict[str, float]:
        """Where the annealing stands, for the metrics."""
        sft, horizon = self.config.sft, sft_horizon(update)
        return {
            "lambda": lambda_at(update.step, horizon, sft.lambda_start, sft.lambda_end),
            "level": float(level_at(update.step, horizon, sft.level_start, sft.level_end)),
        }

    def plan(self, group: Group, update: Update) -> Plan:
        anchor = prompt_share(group, update)
        tree, x = prompt_tree(group)
        plan = Plan(group, {0.0: "trace", 1.0: "prompt"}.get(anchor, "blend"), [tree], [])
        if anchor < 1:
            self._trace_branch(plan, tree, x, 1 - anchor, update)
        if anchor > 0:
            plan.scored += add_rollouts(group, tree, x, Stream.PROMPT, anchor, update)
        return plan

    def _trace_branch(self, plan: Plan, tree: TokenTree, x: Node, share: float, update: Update) -> None:
        """L_RL^h + β·L_SFT. With `demonstration` and `turns`, h* stands in the shared context and SFT reads it there."""
        group, config = plan.group, self.config
        task, trace = group.task, group.task.expert
        assert trace is not None
        level = level_at(update.step, sft_horizon(update), config.sft.level_start, config.sft.level_end)
        cut = level if config.trace.reasoning == "level" else None
        rendering = config.trace.rendering
        context = update.renderer.trace_context(task, trace, "turns" if rendering == "hint" else rendering, cut)
        h = tree.add(context.ids, x)
        plan.expert = h, context.components
        sft = expert_scored(
            group, h, context.components, sft_mask(context, level, update), share * config.sft.coef, update
        )
        if sft and config.sft.coef:
            plan.scored.append(sft)
        parent = h
        if rendering == "hint":
            tree = TokenTree()
            parent = tree.add(update.renderer.hint_prompt_ids(task, trace, cut))
            plan.trees.append(tree)
        plan.scored += add_rollouts(group, tree, parent, Stream.TRACE, share, update)


def prompt_share(group: Group, update: Update) -> float:
    """Share of the prompt-only route: z of the gate, or q. A prompt without an expert trace is always anchored."""
    anchor = update.config.anchor
    if group.task.expert is None or not group.task.expert.turns:
        return 1.0
    if anchor.mode == "blend":
        return anchor.q
    coin = random.Random(f"gate/{update.seed}/{update.step}/{group.index}").random()
    return 1.0 if coin < anchor.q else 0.0


def sft_horizon(update: Update) -> int:
    return update.config.sft.horizon or update.horizon


def sft_mask(context: TraceContext, level: int, update: Update) -> np.ndarray:
    """m_n [n]: 1 in the active reasoning prefix, λ in tool calls, 0 elsewhere."""
    sft = update.config.sft
    strength = lambda_at(update.step, sft_horizon(update), sft.lambda_start, sft.lambda_end)
    mask = np.zeros(len(context.ids), np.float64)
    mask[(context.components == Component.REASONING) & (context.level <= level)] = 1.0
    mask[context.components == Component.TOOL_CALL] = strength
    return mask
