"""HPT (arXiv 2509.04419): SFT for the prompts that few rollouts solve, RL for the others.

A prompt of which at most `gate` of the K rollouts are solved is trained on its complete expert trace, and its rollouts
are left out; every other prompt has the prompt-only policy loss. Prompts without a trace are always in the second class.
"""

from __future__ import annotations

from pact_fast.algorithms.base import TRACE_SETTINGS, Algorithm, Group, PromptBatch, Route, StepContext
from pact_fast.algorithms.grpo import GRPO
from pact_fast.algorithms.luffy import refuse_filter
from pact_fast.algorithms.matchtir import MatchTIR
from pact_fast.algorithms.registry import algorithm
from pact_fast.algorithms.sft import has_trace, sft_batch
from pact_fast.components import LossContext
from pact_fast.config import AlgorithmConfig
from pact_fast.data.types import Trajectory
from pact_fast.errors import PactError


@algorithm("hpt")
class HPT(Algorithm):
    """A switch per prompt and step, by the number of its solved rollouts."""

    own_section = "hpt"
    unused_settings = TRACE_SETTINGS

    def __init__(self, config: AlgorithmConfig):
        super().__init__(config)
        refuse_filter(config)
        self._rl = GRPO(config) if config.hpt.rl == "grpo" else MatchTIR(config)
        self.turn_advantages = self._rl.turn_advantages

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """x → h* if at most `gate` rollouts are solved, else x → {τ}."""
        solved = sum(is_solved(trajectory, self.config.reward.outcome) for trajectory in group.trajectories)
        if has_trace(group.task) and solved <= self.config.hpt.gate:
            return sft_batch(group, step, final_answer=True, weight=self.config.hpt.sft_coef)
        return self._rl.prompt_batch(group, step)

    def routes(self, with_trace: bool) -> list[Route]:
        """The routes of a step without SFT, the larger one; how many prompts are trained on traces is not known before."""
        expert = [Route(0.0, frozenset({LossContext.EXPERT}))] if with_trace else []
        return [*expert, *self._rl.routes(with_trace)]


def is_solved(trajectory: Trajectory, outcome: str) -> bool:
    """Whether a rollout has the full outcome reward, 1. PactError if its environment gives no such reward."""
    if outcome not in trajectory.env_rewards:
        raise PactError(
            f"task {trajectory.task_id}: algorithm.name=hpt counts solved rollouts, and the environment gives no "
            f"'{outcome}'; use an environment that does, or set algorithm.reward.outcome"
        )
    return trajectory.env_rewards[outcome] >= 1.0
