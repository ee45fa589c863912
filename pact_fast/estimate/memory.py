"""The peak of training memory on one device, and what it is made of: `pact-fast doctor RECIPE --memory`.

What a pack holds is not calculated from formulas of a transformer: the update is rehearsed (rehearsal.py). Formulas are
left for what other processes change: shares under ZeRO, buckets, the rollout engine.
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

CUDA_CONTEXT = 1 << 30  # bytes that the driver and the libraries take beside torch's allocator; assumed, not measured
STEP = 128  # tokens; `auto_pack_tokens` gives a multiple
MARGIN = 0.9  # of the free memory: estimates are a few percent low, and allocators leave gaps
ENOUGH = 1 << 17  # tokens; beyond, products of matrices get no faster
CLOSE = 0.02  # of the free memory may stay unused, for fewer rehearsals


@dataclass
class Estimate:
    """parts: bytes by what holds them, at the moment of the peak; tokens: of the largest pack."""

    parts: dict[str, int]
    tokens: int
    parameters: int
    traffic: float  # bytes a token that the trunk's operators read and write, matrix products and attention left out
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(
    config: Config,
    loads: Sequence[PackLoad] | None = None,
    *,
    sharding: Sharding | None = None,
    device: str = "cpu",
    capacity: int | None = None,
) -> Estimate:
    """Of an update on `loads`, the packs of one optimizer step; default: full ones. `device`: cpu or cuda.

    `capacity`: bytes of the device, of which a colocated vLLM takes its share.
    """
    sharding = sharding or Sharding()
    loads = sorted(loads or [default_load(config)] * 2, key=lambda load: -len(load.batch))[:2]
    half = sharding.zero and config.model.dtype == "bfloat16"
    seen = trace_update(config, loads, device, torch.bfloat16 if half else torch.float32)
    size = 2 if half else 4
    result = Estimate(_parts(seen, sharding, size), len(loads[0].batch), seen.parameters, seen.traffic)
    _gathered(result, config, sharding, size, seen.trained if device == "cpu" else BUCKET)
    _others(result, config, device, capacity, sharding.weights * size if sharding.stage == 3 else 4.0)
    if result.tokens > (config.trainer.max_tokens_per_pack or result.tokens):
        result.notes.append(
            f"the longest path alone takes {result.tokens} tokens, more than trainer.max_tokens_per_pack: "
            "rollout.max_prompt_length + rollout.max_completion_length"
        )
    return result


def default_load(config: Config) -> PackLoad:
    """The largest pack that the settings allow; a path over the budget gets a pack of its own."""
    longest = config.rollout.max_prompt_length + config.rollout.max_completion_length
    return full_load(config, max(config.trainer.max_tokens_per_pack or 0, longest))


def fitting_pack_tokens(config: Config, devices: int, device: str, free_bytes: int) -> int:
    """What trainer.max_tokens_per_pack=null means on a device with so much memory, before a run has taken any of it."""
    rollout = config.rollout
    free_bytes = int(free_bytes * (1.0 - engine_builder(config).memory_fraction()))
    trainer = config.trainer
    path = rollout.max_prompt_length + rollout.max_completion_length
    batch = (trainer.prompts_per_update or trainer.prompts_per_step) * rollout.num_generations * path
    most = min(batch, ENOUGH)  # a larger one would hold more than there is
    sharding = sharding_of(config, devices)
    return auto_pack_tokens(config, int(MARGIN * free_bytes), sharding=sharding, device=device, most=most)


def auto_pack_tokens(
    config: Config,
    free_bytes: int,
    *,
    sharding: Sharding | None = None,
    device: str = "cpu",
    most: int | None = None,
) -> int:
    """The largest trainer.max_tokens_per_pack whose update is estimated to fit into `free_bytes`, a multiple of 128 (at most
    `most`, if that is more than the longest path).

    All that training holds counts, weights too. PactError if not even the longest path fits.
    """

    def peak(tokens: int) -> int:
        loads = [full_load(config, tokens)] * 2
        return estimate(config, loads, sharding=sharding, device=device, capacity=None).total

    low = -(-max(config.rollout.max_prompt_length + config.rollout.max_completion_length, STEP) // STEP) * STEP
    held = peak(low)
    if held > free_bytes:
        raise PactError(
            f"a path of {low} tokens needs {format_bytes(held)}, and {format_bytes(free_bytes)} are free; set "
            "model.gradient_checkpointing=true, lower rollout.max_completion_length, or shard with trainer.deepspeed"
        )
    if most is not None:
        most = max(-(-most // STEP) * STEP, low)
        if peak(most) <= free_bytes:
            return most
    # memory is very nearly a line in the tokens: two points tell the third, which is then looked at
    high, top = 2 * low, peak(2 * low)
    while top <= free_bytes and free_bytes - top > CLOSE * free_bytes:
        per_token = max((top - held) / (high - low), 1.0)
        low, held = high, top
        high = max(int(low + (free_bytes - top) / per_token) // STEP * STEP, low + STEP)
        top = peak(high)
    if top <= free_bytes:
        return high
    while high - low > STEP:
        guess = low + (high - low) * (free_bytes - held) / (top - held)
        middle = min(max(int(guess) // STEP * STEP, low + STEP), high - STEP)
        found = peak(middle)
        if found <= free_bytes:
            low, held = middle, found
            if free_bytes - found <= CLOSE * free_bytes:
                break
        else:
            high, top = middle, found
    return low


def format_bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"


def _parts(seen: UpdateTrace, sharding: Sharding, size: int) -> dict[str, int]:
    """The peak of one device. Under ZeRO the optimizer's step is a moment of its own, with fp32 gradients of its part."""
    local = 1.0 / sharding.sequence_parallel
    shares = {
        MemoryKind.WEIGHTS: sharding.weights, MemoryKind.GRADIENTS: sharding.gradients,
        MemoryKind.ACTIVATIONS: local, MemoryKind.HEAD: local,
    }  # fmt: skip
    held = {kind.value: bytes_ for kind, bytes_ in seen.record.peak(shares).items()}
    if not sharding.zero:
        return held
    part = sharding.states * seen.trained
    held |= {"fp32 master weights": round(4 * part), MemoryKind.OPTIMIZER.value: round(8 * part)}
    if sharding.stage == 3:
        held[MemoryKind.GRADIENTS.value] = round(sharding.gradients * 4 * seen.trained)  # there from the start
    # gradients fill the bucket while activations go: the end of the forward pass, that of the backward, or the step
    passing = held[MemoryKind.ACTIVATIONS.value] + held[MemoryKind.HEAD.value]
    bucket, fp32_gradients = min(BUCKET, seen.trained) * size, round(4 * part)
    if passing >= max(bucket, fp32_gradients):
        return held
    held |= {MemoryKind.ACTIVATIONS.value: 0, MemoryKind.HEAD.value: 0}
    return held | (
        {"fp32 gradients of the step": fp32_gradients} if fp32_gradients > bucket else {"communication buckets": bucket}
    )


def _gathered(result: Estimate, config: Config, sharding: Sharding, size: int, bucket: int) -> None:
    """ZeRO-3 gathers a layer or the head when it runs, and the next weights ahead, which are copied when they arrive.

    `bucket`: elements of the reduce bucket that are really there; a CPU does not hold what nobody has written to.
    """
    if sharding.stage < 3 or sharding.devices == 1:
        return
    text = architecture(config.model).get_text_config()
    table = text.vocab_size * text.hidden_size
    layer = max(result.parameters - table, 0) // text.num_hidden_layers
    arriving = min(PREFETCH, result.parameters)
    result.parts["gathered weights"] = size * (min(max(table, layer) + PREFETCH, result.parameters) + arriving)
    result.parts["communication buckets"] = size * min(bucket, BUCKET)


def _others(result: Estimate, config: Config, device: str, capacity: int | None, frozen: float) -> None:
    """What is on the device beside the update. `frozen`: bytes of it for each number of a model that is not trained."""
    if config.algorithm.beta and not config.model.lora:
        result.parts["reference model"] = round(frozen * result.parameters)
    if device == "cuda":
        result.parts["CUDA context (assumed)"] = CUDA_CONTEXT
    fraction = engine_builder(config).memory_fraction()
    if fraction and capacity is None:
        result.notes.append(f"the rollout engine takes {fraction:.0%} of the device on top of this")
    elif fraction and capacity is not None:
        result.parts["rollout engine"] = round(fraction * capacity)
