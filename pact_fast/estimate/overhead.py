"""Parts of a step outside the model's passes: batches and records on the CPU, fingerprints of weights, checkpoints.

Seconds of CPU time were measured on a CPU by `python -m benchmarks.scale` and
`python -m benchmarks.weights_fingerprint` (docs/benchmarks.md). What happens on a GPU is an assumption.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.config import Config
from pact_fast.estimate.hardware import GIGA, Hardware
from pact_fast.estimate.memory import checkpoint_bytes
from pact_fast.estimate.sharding import Sharding
from pact_fast.estimate.step_part import StepPart
from pact_fast.estimate.workload import Lengths
from pact_fast.rollout.registry import engine_builder

# seconds of a rank's CPU time, a fit to the part `step` at 64 prompts on 64 ranks to 1,024 on 512
BATCH_PER_TOKEN = 3.1e-7  # a token of the rollouts that the rank makes batches of
BATCH_PER_ROLLOUT = 4.6e-6  # a rollout of the whole batch, a row of the table
BATCH_PER_RANK = 2.5e-4  # a rank, in collectives
WRITE_PER_TOKEN = 8e-7  # a token that rank 0 writes to rollouts/
# bytes/s
FINGERPRINT_CPU = GIGA / 0.17  # measured; a GPU reads them at its memory's rate, an assumption
HOST_COPY = {
    "cpu": 1.5 * GIGA,
    "cuda": 6.0 * GIGA,
}  # measured, into fresh pages; assumed, for memory that is not pinned


def batches_and_records(config: Config, lengths: Lengths, gpus: int) -> list[StepPart]:
    """Estimate rank 0's work in Python: its prompt batches, assigning packs, reducing metrics, writing rollouts."""
    rollouts = config.trainer.prompts_per_step * lengths.rollouts
    if not make_algorithm(config.algorithm).needs_rollouts:
        return []
    own = rollouts * lengths.response / gpus
    seconds = own * BATCH_PER_TOKEN + rollouts * BATCH_PER_ROLLOUT + gpus * BATCH_PER_RANK
    written = min(config.trainer.save_rollouts, rollouts) * lengths.response * WRITE_PER_TOKEN
    return [
        StepPart("batching", "packs and metrics, CPU time", seconds, "s", 1.0),
        StepPart("records", "rollouts to disk, CPU time", written, "s", 1.0),
    ]


def fingerprints(config: Config, hardware: Hardware, model: PreTrainedModel) -> list[StepPart]:
    """The weights are read by the trainer once, and by each engine twice: after the update, and before the next one."""
    builder = engine_builder(config)
    checked = config.rollout.verify_weights == "always" and make_algorithm(config.algorithm).needs_rollouts
    if not builder.own_weights or not checked:
        return []
    size = 4 if config.model.dtype == "float32" else 2
    read = size * _count(model, trained_only=bool(config.model.lora)) * (1 + 2 / builder.devices_per_engine())
    rate = hardware.memory if hardware.device == "cuda" else FINGERPRINT_CPU
    return [StepPart("communication", "fingerprints of the weights", read, "B", rate)]


def checkpoint(
    config: Config, hardware: Hardware, sharding: Sharding, model: PreTrainedModel, seconds: float
) -> list[StepPart]:
    """Estimate the seconds per step for which training waits for checkpoints, on average.

    Args:
        config: The run's configuration.
        hardware: Rates of a device.
        sharding: How training state is split.
        model: The model, on the meta device.
        seconds: Duration of a step without checkpoints.
    """
    size = checkpoint_bytes(config, sharding, _count(model), _count(model, trained_only=True))
    copies = size / sharding.devices / HOST_COPY[hardware.device]
    waited = max(0.0, copies - seconds)  # copied until the next optimizer step
    minutes = config.trainer.save_minutes
    interval = config.trainer.save_steps if minutes is None else max(1.0, 60 * minutes / seconds)
    return [StepPart("checkpoint", "copies that training waits for", waited / interval, "s", 1.0)]


def _count(model: PreTrainedModel, trained_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)
