"""MatchTIR (arXiv 2601.10712): prompt-only policy loss with turn-level matching rewards and advantages (method, section 3)."""

from __future__ import annotations

from pact_fast.algorithms.base import Algorithm, Group, Plan, Update, add_rollouts, prompt_tree
from pact_fast.kernels.tokens import Stream


class MatchTIR(Algorithm):
    def plan(self, group: Group, update: Update) -> Plan:
        tree, x = prompt_tree(group)
        return Plan(group, "prompt", [tree], add_rollouts(group, tree, x, Stream.PROMPT, 1.0, update))
