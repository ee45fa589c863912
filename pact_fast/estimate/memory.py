"""Peak of training memory on one device and its parts: `pact-fast doctor RECIPE --memory`.

There is no formula for activations: an update of the real model code is traced (update_trace.py). Formulas remain only
for the effects of other ranks and processes: fractions under ZeRO, communication buckets, the rollout engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pact_fast.config import Config
from pact_fast.errors import PactError
from pact_fast.estimate.memory_tracker import MemoryKind
from pact_fast.estimate.sharding import BUCKET, PREFETCH, Sharding, sharding_of
from pact_fast.estimate.update_trace import UpdateTrace, trace_update
from pact_fast.estimate.workload import PackLoad, full_load
from pact_fast.model.build import architecture
from pact_fast.rollout.registry import engine_builder

CUDA_CONTEXT = 1 << 30  # bytes of the driver and libraries outside torch's allocator; assumed, not measured
MULTIPLE = 128  # tokens; `auto_pack_tokens` returns a multiple
USABLE_FRACTION = 0.9  # fraction of free memory to use: estimates are a few percent low, and allocators fragment
MAX_USEFUL_TOKENS = 1 << 17  # tokens; larger packs make matrix products no faster
UNUSED_FRACTION = 0.02  # fraction of free memory that may stay unused, which saves traces


@dataclass
class MemoryEstimate:
    """Peak memory of an update on one device.

    parts       bytes at the moment of the peak, by use
    tokens      tokens of the largest pack
    parameters  elements of the model's parameters
    traffic     bytes per token that the decoder's operators read and write, without matrix products and attention
    notes       remarks for the user
    """

    parts: dict[str, int]
    tokens: int
    parameters: int
    traffic: float
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes of the peak."""
        return sum(self.parts.values())


def estimate(
    config: Config,
    loads: Sequence[PackLoad] | None = None,
    *,
    sharding: Sharding | None = None,
    device: str = "cpu",
    capacity: int | None = None,
) -> MemoryEstimate:
    """Estimate the peak memory of an update.

    Args:
        config: The run's configuration.
        loads: Packs of one optimizer step; default: two full ones.
        sharding: How training state is split over devices; default: one device.
        device: "cpu" or "cuda".
        capacity: Bytes of the device, a fraction of which a colocated vLLM takes.

    Raises:
        PactError: The model's code cannot be traced.
    """
    sharding = sharding or Sharding()
    loads = sorted(loads or [default_load(config)] * 2, key=lambda load: -len(load.batch))[:2]
    bf16_weights = sharding.zero and config.model.dtype == "bfloat16"
    trace = trace_update(config, loads, device, torch.bfloat16 if bf16_weights else torch.float32)
    size = 2 if bf16_weights else 4
    result = MemoryEstimate(_peak_parts(trace, sharding, size), len(loads[0].batch), trace.parameters, trace.traffic)
    _add_gathered_weights(result, config, sharding, size, trace.trained if device == "cpu" else BUCKET)
    _add_other_memory(result, config, device, capacity, sharding.weights * size if sharding.stage == 3 else 4.0)
    if result.tokens > (config.trainer.max_tokens_per_pack or result.tokens):
        result.notes.append(
            f"the longest path alone takes {result.tokens} tokens, more than trainer.max_tokens_per_pack: "
            "rollout.max_prompt_length + rollout.max_completion_length"
        )
    saved = checkpoint_bytes(config, sharding, trace.parameters, trace.trained)
    result.notes.append(
        f"a checkpoint takes {format_bytes(saved)} of the hosts' memory, spread over {sharding.devices} devices, while it is "
        "written; at most half of what is free"
    )
    return result


def checkpoint_bytes(config: Config, sharding: Sharding, parameters: int, trained: int) -> int:
    """Bytes of a checkpoint, all ranks: weights (with LoRA, the adapters), AdamW's moments, and ZeRO's master of bf16.

    Args:
        config: The run's configuration.
        sharding: How training state is split over devices.
        parameters: Elements of the model's parameters.
        trained: Of these, elements that are trained.
    """
    bf16 = sharding.zero and config.model.dtype == "bfloat16"
    return (trained if config.model.lora else parameters) * (2 if bf16 else 4) + trained * (12 if bf16 else 8)


def default_load(config: Config) -> PackLoad:
    """The largest pack that the settings allow. A path longer than the budget gets a pack of its own."""
    longest = config.rollout.max_prompt_length + config.rollout.max_completion_length
    return full_load(config, max(config.trainer.max_tokens_per_pack or 0, longest))


def fitting_pack_tokens(config: Config, devices: int, device: str, free_bytes: int) -> int:
    """The pack budget of trainer.max_tokens_per_pack=null.

    Args:
        config: The run's configuration.
        devices: Devices that train together.
        device: "cpu" or "cuda".
        free_bytes: Free memory of the device before the run has allocated anything.
    """
    rollout = config.rollout
    free_bytes = int(free_bytes * (1.0 - engine_builder(config).memory_fraction()))
    trainer = config.trainer
    path = rollout.max_prompt_length + rollout.max_completion_length
    batch = (trainer.prompts_per_update or trainer.prompts_per_step) * rollout.num_generations * path
    most = min(batch, MAX_USEFUL_TOKENS)  # there are no more tokens in a batch
    sharding = sharding_of(config, devices)
    return auto_pack_tokens(config, int(USABLE_FRACTION * free_bytes), sharding=sharding, device=device, most=most)


def auto_pack_tokens(
    config: Config,
    free_bytes: int,
    *,
    sharding: Sharding | None = None,
    device: str = "cpu",
    most: int | None = None,
) -> int:
    """The largest trainer.max_tokens_per_pack whose update is estimated to fit, a multiple of 128.

    Args:
        config: The run's configuration.
        free_bytes: Memory for everything that training holds, weights included.
        sharding: How training state is split over devices; default: one device.
        device: "cpu" or "cuda".
        most: Upper bound of the result, unless the longest path is longer.

    Raises:
        PactError: Not even the longest path fits.
    """

    def peak(tokens: int) -> int:
        loads = [full_load(config, tokens)] * 2
        return estimate(config, loads, sharding=sharding, device=device, capacity=None).total

    path = config.rollout.max_prompt_length + config.rollout.max_completion_length
    low = -(-max(path, MULTIPLE) // MULTIPLE) * MULTIPLE
    held = peak(low)
    if held > free_bytes:
        raise PactError(
            f"a path of {low} tokens needs {format_bytes(held)}, and {format_bytes(free_bytes)} are free; set "
            "model.gradient_checkpointing=true, lower rollout.max_completion_length, or shard with trainer.deepspeed"
        )
    if most is not None:
        most = max(-(-most // MULTIPLE) * MULTIPLE, low)
        if peak(most) <= free_bytes:
            return most
    # memory is almost linear in tokens: extrapolate from two points, then check the third
    high, top = 2 * low, peak(2 * low)
    while top <= free_bytes and free_bytes - top > UNUSED_FRACTION * free_bytes:
        per_token = max((top - held) / (high - low), 1.0)
        low, held = high, top
        high = max(int(low + (free_bytes - top) / per_token) // MULTIPLE * MULTIPLE, low + MULTIPLE)
        top = peak(high)
    if top <= free_bytes:
        return high
    while high - low > MULTIPLE:
        guess = low + (high - low) * (free_bytes - held) / (top - held)
        middle = min(max(int(guess) // MULTIPLE * MULTIPLE, low + MULTIPLE), high - MULTIPLE)
        needed = peak(middle)
        if needed <= free_bytes:
            low, held = middle, needed
            if free_bytes - needed <= UNUSED_FRACTION * free_bytes:
                break
        else:
            high, top = middle, needed
    return low


def format_bytes(size: float) -> str:
    """`1.25 GiB` or `310 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"


def _peak_parts(trace: UpdateTrace, sharding: Sharding, size: int) -> dict[str, int]:
    """Bytes on one device at the peak, by kind. `size`: bytes per element of the weights.

    Under ZeRO, the optimizer step may be the peak: it holds fp32 gradients of the device's partition.
    """
    local = 1.0 / sharding.sequence_parallel
    fractions = {
        MemoryKind.WEIGHTS: sharding.weights, MemoryKind.GRADIENTS: sharding.gradients,
        MemoryKind.ACTIVATIONS: local, MemoryKind.HEAD: local,
    }  # fmt: skip
    held = {kind.value: bytes_ for kind, bytes_ in trace.record.peak(fractions).items()}
    if not sharding.zero:
        return held
    part = sharding.states * trace.trained
    held |= {"fp32 master weights": round(4 * part), MemoryKind.OPTIMIZER.value: round(8 * part)}
    if sharding.stage == 3:
        held[MemoryKind.GRADIENTS.value] = round(sharding.gradients * 4 * trace.trained)  # allocated from the start
    # candidates for the peak: end of the forward pass (activations), end of the backward pass (bucket), optimizer step
    passing = held[MemoryKind.ACTIVATIONS.value] + held[MemoryKind.HEAD.value]
    bucket, fp32_gradients = min(BUCKET, trace.trained) * size, round(4 * part)
    if passing >= max(bucket, fp32_gradients):
        return held
    held |= {MemoryKind.ACTIVATIONS.value: 0, MemoryKind.HEAD.value: 0}
    return held | (
        {"fp32 gradients of the step": fp32_gradients} if fp32_gradients > bucket else {"communication buckets": bucket}
    )


def _add_gathered_weights(result: MemoryEstimate, config: Config, sharding: Sharding, size: int, bucket: int) -> None:
    """Add ZeRO-3's gathered weights: the running layer or head, and prefetched weights, which are copied on arrival.

    Args:
        result: The estimate to add to.
        config: Gives the architecture.
        sharding: Nothing is added below stage 3.
        size: Bytes per element of the weights.
        bucket: Elements of the reduce bucket that occupy memory; on a CPU, untouched pages do not.
    """
    if sharding.stage < 3 or sharding.devices == 1:
        return
    text = architecture(config.model).get_text_config()
    table = text.vocab_size * text.hidden_size
    layer = max(result.parameters - table, 0) // text.num_hidden_layers
    arriving = min(PREFETCH, result.parameters)
    result.parts["gathered weights"] = size * (min(max(table, layer) + PREFETCH, result.parameters) + arriving)
    result.parts["communication buckets"] = size * min(bucket, BUCKET)


def _add_other_memory(
    result: MemoryEstimate, config: Config, device: str, capacity: int | None, frozen_size: float
) -> None:
    """Add the reference model, the CUDA context and the rollout engine.

    Args:
        result: The estimate to add to.
        config: The run's configuration.
        device: "cpu" or "cuda".
        capacity: Bytes of the device, if known.
        frozen_size: Bytes on this device per element of a frozen model.
    """
    if config.algorithm.beta and not config.model.lora:
        result.parts["reference model"] = round(frozen_size * result.parameters)
    if device == "cuda":
        result.parts["CUDA context (assumed)"] = CUDA_CONTEXT
    fraction = engine_builder(config).memory_fraction()
    if fraction and capacity is None:
        result.notes.append(f"the rollout engine takes {fraction:.0%} of the device on top of this")
    elif fraction and capacity is not None:
        result.parts["rollout engine"] = round(fraction * capacity)
