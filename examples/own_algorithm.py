"""An algorithm in one file: learn from the rollouts that did better than their group, and from those only.

    pact-fast train quickstart algorithm.name=examples/own_algorithm.py:BetterHalf

An algorithm turns the group of one prompt (task, rollouts, advantages) into token trees and weighted tokens. Weights hold
every normaliser: `add_rollouts` takes care of it.
"""

from __future__ import annotations

from pact_fast.algorithms.base import Algorithm, Group, PromptBatch, StepContext, add_rollouts, prompt_tree
from pact_fast.components import LossContext


class BetterHalf(Algorithm):
    """Prompt-only policy loss on the rollouts with an advantage above `algorithm.args.threshold` (default 0)."""

    turn_advantages = False  # one outcome reward per rollout

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        threshold = float(self.config.args.get("threshold", 0.0))
        tree, prompt = prompt_tree(group)
        scored = add_rollouts(group, tree, prompt, LossContext.PROMPT, 1.0, step)
        for rollout in scored:
            rollout.rl_weight[rollout.advantage <= threshold] = 0.0
        return PromptBatch(group, "prompt", [tree], scored)
