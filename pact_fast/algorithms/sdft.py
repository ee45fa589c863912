"""SDFT (arXiv 2601.19897) and OPSD (arXiv 2601.18734): on-policy self-distillation from the policy that sees the trace.

L = mean over the sampled tokens of own rollouts of D( π(·|x, τ_<n), sg π(·|x, h*, τ_<n) ),   D = KL(p ‖ q) over the vocabulary

Rollouts are sampled from x alone, and no reward enters the loss. The teacher has the current weights, without a gradient,
and sees the trace as PACT renders it (`trace.rendering`).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pact_fast.algorithms.base import (
    TURN_SETTINGS,
    Algorithm,
    Group,
    PromptBatch,
    Requirements,
    Route,
    StepContext,
    prompt_tree,
    score_rollout,
)
from pact_fast.algorithms.branches import ExpertNodes, add_branches, add_context, rewound
from pact_fast.algorithms.registry import algorithm
from pact_fast.algorithms.sft import missing_trace
from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.batch.tree import Node, TokenTree
from pact_fast.components import LossContext


@algorithm("sdft")
class SDFT(Algorithm):
    """Rollouts under both contexts, and the divergence of each token's two distributions."""

    needs_rewards = False
    needs_traces = True
    turn_advantages = False
    own_section = "sdft"
    unused_settings = {  # noqa: RUF012
        "anchor": None,
        "sft": None,
        "trace": ("context_importance_weight", "context_importance_weight_clip"),
        "reward": TURN_SETTINGS,
    }

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """x → {τ}, and with the trace in front of them the same {τ}. PactError if the task has no expert trace."""
        batch, x, c = self._contexts(group, step)
        [tree] = batch.trees
        for k, trajectory in enumerate(group.trajectories):
            pieces = [add_branches(tree, context, trajectory) for context in (x, c)]
            for student_piece, teacher_piece in zip(*pieces, strict=True):
                if not student_piece.node.children:  # a node that branches goes with its first leaf, in either context
                    tree.pair(student_piece.node, teacher_piece.node)
            students = score_rollout(group, k, pieces[0], LossContext.PROMPT, 1.0, step)
            teachers = score_rollout(group, k, pieces[1], LossContext.TRACE, 0.0, step)
            for student, teacher in zip(students, teachers, strict=True):
                batch.scored += distilled(student, teacher)
        return batch

    def _contexts(self, group: Group, step: StepContext) -> tuple[PromptBatch, Node, Node]:
        """(batch with a tree of the two contexts, node that ends x, node that ends x with the trace)."""
        task, trace = group.task, group.task.expert
        if trace is None or not trace.turns:
            raise missing_trace(task, self.config)
        rendering, tail = self.config.trace.rendering, rewound(group.trajectories)
        if rendering == "hint":
            tree = TokenTree()
            root = tree.add(np.zeros(0, np.int64))  # the contexts share nothing, and their rollouts must share a pack
            hint = step.renderer.hint_prompt_ids(task, trace)
            x, c = (add_context(tree, ids, root, tail) for ids in (group.prompt_ids, hint))
            return PromptBatch(group, "blend", [tree], []), x, c
        context = step.renderer.trace_context(task, trace, rendering).last_branch()  # no token of it is trained
        tree, x = prompt_tree(group, context)
        expert = ExpertNodes(add_branches(tree, x, context, tail), context)
        return PromptBatch(group, "blend", [tree], [], expert), x, expert.pieces[-1].node

    def requirements(self, sampler_differs: bool) -> Requirements:
        """The divergence. No importance weights: there is no ratio to correct."""
        return Requirements(reference=self.config.beta > 0, divergence=self.config.sdft.divergence)

    def routes(self, with_trace: bool) -> list[Route]:
        """Rollouts under both contexts."""
        return [Route(1.0, frozenset({LossContext.PROMPT, LossContext.TRACE} if with_trace else ()))]


def distilled(student: ScoredTokens, teacher: ScoredTokens) -> list[ScoredTokens]:
    """Both, with the divergence in the loss in place of the policy loss; KL and entropy terms keep their weight."""
    zero = np.zeros_like(student.advantage)
    paired = dataclasses.replace(student, advantage=zero, teacher=teacher, pair_weight=student.rl_weight)
    return [paired, teacher]
