"""Estimated time of a training step, and its bottleneck: `pact-fast plan RECIPE`. Experimental.

Each part of a step is an amount (FLOPs, bytes, or seconds measured elsewhere) divided by a rate. Parts are assumed not to
overlap. Amounts come from the code that runs: token trees of the algorithm's routes, packs, and a traced update
(update_trace.py). Only updates on CPUs have been compared with measurements (docs/benchmarks.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.batch.flops import work_of_packs
from pact_fast.config import Config
from pact_fast.estimate import overhead
from pact_fast.estimate.hardware import Hardware
from pact_fast.estimate.memory import MemoryEstimate, estimate
from pact_fast.estimate.sharding import Sharding
from pact_fast.estimate.step_part import StepPart
from pact_fast.estimate.workload import Lengths, PackLoad, update_loads
from pact_fast.model.build import meta_model
from pact_fast.model.flops import decoder_flops
from pact_fast.rollout.registry import engine_builder

SAMPLED_PROMPTS = 16  # prompts whose packs are made; the result is scaled to all prompts of a step
OPTIMIZER_PASSES = 10  # 4-byte reads and writes per trained weight: norm 1, clip 2, fused AdamW 7


@dataclass
class StepEstimate:
    """Estimated time and memory of a training step.

    parts     parts of the time, on one device
    memory    peak memory of an update on one device
    hardware  rates that were used
    lengths   tokens of prompts, traces and rollouts
    tokens    decoder tokens of a step, all devices
    unshared  the same if every sequence ran alone
    notes     remarks for the user
    """

    parts: list[StepPart]
    memory: MemoryEstimate
    hardware: Hardware
    lengths: Lengths
    tokens: float
    unshared: float
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of a step, without overlap."""
        return sum(part.seconds for part in self.parts)

    @property
    def bottleneck(self) -> StepPart:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: part.seconds)


def default_lengths(config: Config, prompt: int | None, trace: int | None, response: int | None) -> Lengths:
    """Lengths for an estimate. None: the limit of the settings; for a trace, the length of a response."""
    response = config.rollout.max_completion_length if response is None else response
    trace = response if trace is None else trace
    prompt = config.rollout.max_prompt_length if prompt is None else prompt
    return Lengths(prompt, trace, response, config.rollout.num_generations)


def estimate_step(config: Config, hardware: Hardware, lengths: Lengths, sharding: Sharding, gpus: int) -> StepEstimate:
    """Estimate one training step.

    Args:
        config: The run's configuration.
        hardware: Rates of a device.
        lengths: Tokens of prompts, traces and rollouts.
        sharding: How training state is split.
        gpus: Devices that train and sample.
    """
    trainer = config.trainer
    prompts = trainer.prompts_per_step
    sample = min(trainer.prompts_per_update or prompts, SAMPLED_PROMPTS)
    loads = update_loads(config, lengths, sample)
    model = meta_model(config)
    updates = prompts // (trainer.prompts_per_update or prompts)
    scale = prompts / sample / gpus  # from the sampled prompts to one device's part of a step
    memory = estimate(config, loads, sharding=sharding, device=hardware.device, capacity=hardware.capacity)
    parts = [
        *_rollouts(config, hardware, lengths, model, gpus),
        *_passes(config, hardware, sharding, loads, model, scale, updates, memory.traffic),
        *_communication(config, hardware, model, sharding, updates, math.ceil(len(loads) * scale / updates)),
        *overhead.fingerprints(config, hardware, model),
        *overhead.batches_and_records(config, lengths, gpus),
    ]
    parts += overhead.checkpoint(config, hardware, sharding, model, sum(part.seconds for part in parts))
    tokens = sum(len(load.batch) for load in loads)
    paths = _unshared(config, lengths, sample)
    result = StepEstimate(parts, memory, hardware, lengths, tokens * prompts / sample, paths * prompts / sample)
    if memory.total > hardware.capacity:
        result.notes.append("it does not fit: raise --zero-stage or --gpus, or lower trainer.max_tokens_per_pack")
    return result


def _unshared(config: Config, lengths: Lengths, prompts: int) -> int:
    """Decoder tokens if every sequence ran alone."""
    alone = config.model_copy(update={"trainer": config.trainer.model_copy(update={"share_prefixes": False})})
    return sum(len(load.batch) for load in update_loads(alone, lengths, prompts))


def _passes(
    config: Config,
    hardware: Hardware,
    sharding: Sharding,
    loads: list[PackLoad],
    model: PreTrainedModel,
    scale: float,
    updates: int,
    traffic: float,
) -> list[StepPart]:
    """Forward and backward passes, the optimizer, and the passes without gradient before them.

    Args:
        config: The run's configuration.
        hardware: Rates of a device.
        sharding: How training state is split.
        loads: Packs of the sampled prompts.
        model: The model, on the meta device.
        scale: From the sampled prompts to one device's part of a step.
        updates: Optimizer steps per training step.
        traffic: Bytes per token of pointwise operators.
    """
    text = model.config.get_text_config()
    work = work_of_packs([load.batch for load in loads])
    weights = decoder_flops(model, work._replace(pairs=0))
    pairs = decoder_flops(model, work._replace(tokens=0))
    head = 6.0 * text.vocab_size * text.hidden_size * sum(load.supervised for load in loads)
    recompute = 4 / 3 if config.model.gradient_checkpointing else 1.0  # one more forward pass of the decoder
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    owners = sharding.devices if sharding.zero else 1
    parts = [
        StepPart("update", "decoder, matrix products", scale * recompute * weights, "FLOP", hardware.matmul),
        StepPart("update", "decoder, attention", scale * recompute * pairs, "FLOP", hardware.attention),
        StepPart("update", "decoder, pointwise", scale * traffic * work.tokens, "B", hardware.memory),
        StepPart("update", "head", scale * head, "FLOP", hardware.matmul),
        StepPart("update", "optimizer", 4.0 * OPTIMIZER_PASSES * trained * updates / owners, "B", hardware.memory),
    ]
    extra = _forward_passes(config, updates)
    third = extra * scale / 3
    if extra:
        parts.append(
            StepPart("log-probs", "old and reference log-probs", third * (weights + head), "FLOP", hardware.matmul)
        )
        parts.append(StepPart("log-probs", "attention of these", third * pairs, "FLOP", hardware.attention))
    return parts


def _forward_passes(config: Config, updates: int) -> int:
    """Forward passes over the batch before the first optimizer step (`Learner.prepare`)."""
    needs = make_algorithm(config.algorithm).requirements(engine_builder(config).sampler_differs)
    return int(updates > 1 or needs.old_logprob) + int(needs.reference)


def _rollouts(
    config: Config, hardware: Hardware, lengths: Lengths, model: PreTrainedModel, gpus: int
) -> list[StepPart]:
    """Rollouts: prefill of each prompt once; each decoding step reads all weights and the batch's keys and values."""
    if not make_algorithm(config.algorithm).needs_rollouts:
        return []
    text, rollout, builder = model.config.get_text_config(), config.rollout, engine_builder(config)
    ranks = builder.devices_per_engine()
    replicas = max(gpus // ranks, 1) if builder.own_weights else 1
    sequences = config.trainer.prompts_per_step * lengths.rollouts / replicas
    batch = min(sequences, rollout.max_batch_size)
    steps = lengths.response * math.ceil(sequences / batch)
    size = 4 if config.model.dtype == "float32" else 2
    parameters = sum(p.numel() for p in model.parameters())
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * kv_heads * width * size
    read = parameters * size + batch * per_token * (lengths.prompt + lengths.response / 2)
    prefill = 2.0 * parameters * lengths.prompt * config.trainer.prompts_per_step / replicas
    return [
        StepPart("rollout", "prompts", prefill / ranks, "FLOP", hardware.matmul),
        StepPart("rollout", "decoding", steps * read / ranks, "B", hardware.memory),
    ]


def _communication(
    config: Config, hardware: Hardware, model: PreTrainedModel, sharding: Sharding, updates: int, packs: int
) -> list[StepPart]:
    """Communication, as bytes that one device sends with ring collectives.

    Args:
        config: The run's configuration.
        hardware: Rates of the links.
        model: The model, on the meta device.
        sharding: How training state is split.
        updates: Optimizer steps per training step.
        packs: Packs of one device per optimizer step.
    """
    parts = []
    size = 2 if config.model.dtype == "bfloat16" else 4
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    link = hardware.link if sharding.devices <= hardware.node else hardware.network
    if sharding.devices > 1:
        ring = (sharding.devices - 1) / sharding.devices
        gradients = ring * trained * (size if sharding.zero else 4) * updates
        if sharding.stage >= 2:  # gradients of each pack are reduced at once
            parts.append(StepPart("communication", "gradients, reduce-scatter", gradients * packs, "B", link))
        else:
            parts.append(StepPart("communication", "gradients, reduce", gradients * (2 - sharding.zero), "B", link))
        if sharding.stage == 3:
            gathered = ring * parameters * size * 2 * packs * updates
            parts.append(StepPart("communication", "weights, all-gather", gathered, "B", link))
        elif sharding.zero:
            parts.append(StepPart("communication", "weights, all-gather", ring * trained * size * updates, "B", link))
    builder = engine_builder(config)
    if builder.own_weights and make_algorithm(config.algorithm).needs_rollouts:
        rate = hardware.memory if builder.shares_device() and sharding.stage < 3 else link
        parts.append(StepPart("communication", "weights to the engine", parameters * size, "B", rate))
    return parts
