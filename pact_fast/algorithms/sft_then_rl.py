"""SFT, then RL, as one run: complete expert traces for the first N training steps, then the prompt-only policy loss.

Model, optimizer state and learning-rate schedule continue across the switch. The stage is a function of the training
step, so a resumed run is in the right one.
"""

from __future__ import annotations

from pact_fast.algorithms.base import TRACE_SETTINGS, Algorithm, Group, PromptBatch, Route, StepContext
from pact_fast.algorithms.grpo import GRPO
from pact_fast.algorithms.matchtir import MatchTIR
from pact_fast.algorithms.registry import algorithm
from pact_fast.algorithms.sft import sft_batch
from pact_fast.components import LossContext
from pact_fast.config import AlgorithmConfig
from pact_fast.errors import PactError


@algorithm("sft_then_rl")
class SFTThenRL(Algorithm):
    """SFT without rollouts in steps 0 … N − 1, then GRPO or MatchTIR."""

    own_section = "sft_then_rl"
    unused_settings = TRACE_SETTINGS

    def __init__(self, config: AlgorithmConfig):
        super().__init__(config)
        if config.sft_then_rl.steps is None:
            raise PactError(
                f"algorithm.name={config.name} needs algorithm.sft_then_rl.steps, the training steps of SFT before RL; "
                "set it"
            )
        self._sft_steps = config.sft_then_rl.steps
        self._rl = GRPO(config) if config.sft_then_rl.rl == "grpo" else MatchTIR(config)
        self.turn_advantages = self._rl.turn_advantages

    def samples(self, step: int) -> bool:
        return step >= self._sft_steps

    def prompt_batch(self, group: Group, step: StepContext) -> PromptBatch:
        """x → h* in the first stage (PactError if the task has no expert trace), x → {τ} in the second."""
        if self.samples(step.step):
            return self._rl.prompt_batch(group, step)
        return sft_batch(group, step, final_answer=True)

    def schedule(self, step: StepContext) -> dict[str, float]:
        """Weight of SFT: 1, then 0."""
        return {"schedule/sft_weight": float(not self.samples(step.step))}

    def routes(self, with_trace: bool) -> list[Route]:
        """The routes of an RL step, the larger one. Traces are trained on, too, in steps of their own."""
        expert = [Route(0.0, frozenset({LossContext.EXPERT}))] if with_trace else []
        return [*expert, *self._rl.routes(with_trace)]
