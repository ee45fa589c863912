"""SFT on the expert trace: mean negative log-likelihood of everything that the expert generated in h*."""

from __future__ import annotations

import numpy as np

from pact_fast.algorithms.base import Algorithm, Group, Plan, Update, expert_scored, prompt_tree
from pact_fast.data.types import Component
from pact_fast.errors import PactError


class SFT(Algorithm):
    needs_rollouts = False

    def plan(self, group: Group, update: Update) -> Plan:
        task = group.task
        if task.expert is None or not task.expert.turns:
            raise PactError(
                f"task {task.id}: algorithm.name=sft needs an expert trace in every row; drop the row or add one"
            )
        tree, x = prompt_tree(group)
        context = update.renderer.trace_context(task, task.expert, "turns")
        h = tree.add(context.ids, x)
        generated = np.isin(context.components, [Component.REASONING, Component.TOOL_CALL, Component.ANSWER])
        scored = expert_scored(group, h, context.components, generated.astype(np.float64), 1.0, update)
        return Plan(group, "expert", [tree], [scored] if scored else [], (h, context.components))
