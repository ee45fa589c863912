"""What one of several devices holds under ZeRO: which share of the weights, gradients and optimizer states, and buffers."""

from __future__ import annotations

from dataclasses import dataclass

from pact_fast.config import Config, DeepSpeedConfig
from pact_fast.errors import PactError

BUCKET = 500_000_000  # elements of DeepSpeed's reduce bucket, its default
PREFETCH = 50_000_000  # elements that ZeRO-3 gathers ahead, its default


@dataclass(frozen=True)
class Sharding:
    """`devices` that take part in data parallelism, the ZeRO stage, and what is moved to the host."""

    devices: int = 1
    stage: int = 0
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise PactError(f"--world-size {self.devices}: there is at least one device")
        if self.stage not in (0, 1, 2, 3):
            raise PactError(f"--zero-stage {self.stage}: the stages are 0 (nothing is sharded), 1, 2 and 3")
        if self.devices % self.sequence_parallel:
            raise PactError(
                f"trainer.sequence_parallel_size={self.sequence_parallel} must divide the {self.devices} devices"
            )

    @property
    def zero(self) -> bool:
        """DeepSpeed keeps the weights: in the type of the computation, beside a sharded fp32 copy."""
        return self.stage > 0

    @property
    def weights(self) -> float:
        """Share of the weights that a device holds between uses."""
        if self.stage < 3:
            return 1.0
        return 0.0 if self.weights_on_host else 1.0 / self.devices

    @property
    def gradients(self) -> float:
        if self.stage < 2:
            return 1.0
        return 0.0 if self.optimizer_on_host else 1.0 / self.devices

    @property
    def states(self) -> float:
        """Share of the fp32 copy of the weights and of both moments."""
        if self.stage < 1:
            return 1.0
        return 0.0 if self.optimizer_on_host else 1.0 / self.devices


def sharding_of(config: Config, devices: int | None = None, stage: int | None = None) -> Sharding:
    """As the settings say; options given on the command line come first."""
    trainer = config.trainer
    settings = trainer.deepspeed or DeepSpeedConfig(stage=0)
    return Sharding(
        devices=devices if devices is not None else 1,
        stage=stage if stage is not None else settings.stage,
        optimizer_on_host=settings.offload_optimizer != "none",
        weights_on_host=settings.offload_param != "none",
        sequence_parallel=trainer.sequence_parallel_size,
    )
