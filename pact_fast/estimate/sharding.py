"""Fractions of weights, gradients and optimizer states that one device holds under ZeRO, and DeepSpeed's buffer sizes."""

from __future__ import annotations

from dataclasses import dataclass

from pact_fast.config import Config, DeepSpeedConfig
from pact_fast.errors import PactError

BUCKET = 500_000_000  # elements of DeepSpeed's reduce bucket (its default)
PREFETCH = 50_000_000  # elements that ZeRO-3 prefetches (its default)


@dataclass(frozen=True)
class Sharding:
    """Partitioning of the training state over devices.

    devices            devices that train together
    stage              ZeRO stage
    optimizer_on_host  optimizer states are offloaded
    weights_on_host    weights are offloaded (stage 3)
    sequence_parallel  devices that share a pack
    """

    devices: int = 1
    stage: int = 0
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise PactError(f"--world-size {self.devices}: give at least one device")
        if self.stage not in (0, 1, 2, 3):
            raise PactError(f"--zero-stage {self.stage}: the stages are 0 (nothing is sharded), 1, 2 and 3")
        if self.devices % self.sequence_parallel:
            raise PactError(
                f"trainer.sequence_parallel_size={self.sequence_parallel} must divide the {self.devices} devices"
            )

    @property
    def zero(self) -> bool:
        """Some ZeRO stage is on. DeepSpeed then holds weights in the compute dtype, and a sharded fp32 master copy."""
        return self.stage > 0

    @property
    def weights(self) -> float:
        """Fraction of the weights that a device holds between uses."""
        if self.stage < 3:
            return 1.0
        return 0.0 if self.weights_on_host else 1.0 / self.devices

    @property
    def gradients(self) -> float:
        """Fraction of the gradients that a device holds."""
        if self.stage < 2:
            return 1.0
        return 0.0 if self.optimizer_on_host else 1.0 / self.devices

    @property
    def states(self) -> float:
        """Fraction of the fp32 master weights and of both AdamW moments that a device holds."""
        if self.stage < 1:
            return 1.0
        return 0.0 if self.optimizer_on_host else 1.0 / self.devices


def sharding_of(config: Config, devices: int | None = None, stage: int | None = None) -> Sharding:
    """Sharding of a run.

    Args:
        config: Gives the ZeRO stage, offloading and sequence parallelism.
        devices: Devices that train together; default: 1.
        stage: ZeRO stage instead of the configured one.
    """
    trainer = config.trainer
    settings = trainer.deepspeed or DeepSpeedConfig(stage=0)
    return Sharding(
        devices=devices if devices is not None else 1,
        stage=stage if stage is not None else settings.stage,
        optimizer_on_host=settings.offload_optimizer != "none",
        weights_on_host=settings.offload_param != "none",
        sequence_parallel=trainer.sequence_parallel_size,
    )
