"""The backend that a configuration asks for."""

from __future__ import annotations

from pact_fast.config import TrainerConfig
from pact_fast.distributed.world import World
from pact_fast.model.policy import Policy
from pact_fast.train.backends.base import Backend
from pact_fast.train.backends.replicated import Replicated


def make_backend(policy: Policy, trainer: TrainerConfig, dtype: str, world: World) -> Backend:
    """The backend that `trainer.deepspeed` asks for.

    Args:
        policy: The policy to train.
        trainer: Optimizer and DeepSpeed settings.
        dtype: "float32" or "bfloat16"; DeepSpeed holds parameters in it.
        world: All ranks.
    """
    if trainer.deepspeed is None or trainer.deepspeed.stage == 0:
        return Replicated(policy, trainer, world)
    from pact_fast.train.backends.zero import Zero

    return Zero(policy, trainer, dtype, world)
