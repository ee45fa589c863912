"""How long a step will take and what will hold it up: `pact-fast plan RECIPE`.

Every part is an amount over a rate, FLOPs or bytes, and parts follow one another: nothing is assumed to overlap. Amounts
come from the code that runs: token trees as the algorithm makes them, packs, and a rehearsed update (rehearsal.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.batch.flops import decoder_flops, work_of_packs
from pact_fast.config import Config
from pact_fast.estimate.hardware import Hardware
from pact_fast.estimate.memory import Estimate, estimate
from pact_fast.estimate.sharding import Sharding
from pact_fast.estimate.workload import Lengths, PackLoad, update_loads
from pact_fast.model.build import meta_model
from pact_fast.rollout.registry import engine_builder

SAMPLE = 16  # prompts of a step that are laid out; further ones are like them
OPTIMIZER_PASSES = 10  # reads and writes of 4 bytes for each weight: norm 1, clip 2, AdamW in one go 7


@dataclass(frozen=True)
class Part:
    """`amount` FLOP or B of one device in a whole step, at `rate` a second."""

    phase: str
    name: str
    amount: float
    unit: str
    rate: float

    @property
    def seconds(self) -> float:
        return self.amount / self.rate if self.rate else 0.0


@dataclass
class StepEstimate:
    parts: list[Part]
    memory: Estimate
    hardware: Hardware
    lengths: Lengths
    tokens: float  # of the trunk in a step, all devices
    unshared: float
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(part.seconds for part in self.parts)

    @property
    def bottleneck(self) -> Part:
        return max(self.parts, key=lambda part: part.seconds)


def default_lengths(config: Config, prompt: int | None, trace: int | None, response: int | None) -> Lengths:
    """What is not given is the limit of the settings; a trace is as long as a response."""
    response = config.rollout.max_completion_length if response is None else response
    trace = response if trace is None else trace
    prompt = config.rollout.max_prompt_length if prompt is None else prompt
    return Lengths(prompt, trace, response, config.rollout.num_generations)


def estimate_step(config: Config, hardware: Hardware, lengths: Lengths, sharding: Sharding, gpus: int) -> StepEstimate:
    """Of one rollout-and-update step on `gpus` devices."""
    trainer = config.trainer
    prompts = trainer.prompts_per_step
    sample = min(trainer.prompts_per_update or prompts, SAMPLE)
    loads = update_loads(config, lengths, sample)
    model = meta_model(config)
    updates = prompts // (trainer.prompts_per_update or prompts)
    share = prompts / sample / gpus  # of what the sample needs, on one device in a step
    memory = estimate(config, loads, sharding=sharding, device=hardware.device, capacity=hardware.capacity)
    parts = [
        *_rollouts(config, hardware, lengths, model, gpus),
        *_passes(config, hardware, sharding, loads, model, share, updates, memory.traffic),
        *_communication(config, hardware, model, sharding, updates, math.ceil(len(loads) * share / updates)),
    ]
    tokens = sum(len(load.batch) for load in loads)
    paths = _unshared(config, lengths, sample)
    result = StepEstimate(parts, memory, hardware, lengths, tokens * prompts / sample, paths * prompts / sample)
    if memory.total > hardware.capacity:
        result.notes.append("it does not fit: raise --zero-stage or --gpus, or lower trainer.max_tokens_per_pack")
    return result


def _unshared(config: Config, lengths: Lengths, prompts: int) -> int:
    """Tokens of the trunk if every sequence ran alone."""
    alone = config.model_copy(update={"trainer": config.trainer.model_copy(update={"share_prefixes": False})})
    return sum(len(load.batch) for load in update_loads(alone, lengths, prompts))


def _passes(
    config: Config,
    hardware: Hardware,
    sharding: Sharding,
    loads: list[PackLoad],
    model: PreTrainedModel,
    share: float,
    updates: int,
    traffic: float,
) -> list[Part]:
    """Forward and backward passes and the optimizer, and the passes without gradient that come before them."""
    text = model.config.get_text_config()
    work = work_of_packs([load.batch for load in loads])
    weights = decoder_flops(model, work._replace(pairs=0))
    pairs = decoder_flops(model, work._replace(tokens=0))
    head = 6.0 * text.vocab_size * text.hidden_size * sum(load.supervised for load in loads)
    again = 4 / 3 if config.model.gradient_checkpointing else 1.0  # the trunk runs forward once more
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    owners = sharding.devices if sharding.zero else 1
    parts = [
        Part("update", "trunk, matrix products", share * again * weights, "FLOP", hardware.matmul),
        Part("update", "trunk, attention", share * again * pairs, "FLOP", hardware.attention),
        Part("update", "trunk, pointwise", share * traffic * work.tokens, "B", hardware.memory),
        Part("update", "head", share * head, "FLOP", hardware.matmul),
        Part("update", "optimizer", 4.0 * OPTIMIZER_PASSES * trained * updates / owners, "B", hardware.memory),
    ]
    extra = _forward_passes(config, updates)
    third = extra * share / 3
    if extra:
        parts.append(Part("before", "old and reference log-probs", third * (weights + head), "FLOP", hardware.matmul))
        parts.append(Part("before", "their attention", third * pairs, "FLOP", hardware.attention))
    return parts


def _forward_passes(config: Config, updates: int) -> int:
    """Passes over the batch before the first optimizer step (Learner.prepare)."""
    needs = make_algorithm(config.algorithm).requirements(engine_builder(config).sampler_differs)
    return int(updates > 1 or needs.old_logprob) + int(needs.reference)


def _rollouts(config: Config, hardware: Hardware, lengths: Lengths, model: PreTrainedModel, gpus: int) -> list[Part]:
    """Decoding reads all weights and the batch's keys and values for every token; prompts are computed once each."""
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
        Part("rollout", "prompts", prefill / ranks, "FLOP", hardware.matmul),
        Part("rollout", "decoding", steps * read / ranks, "B", hardware.memory),
    ]


def _communication(
    config: Config, hardware: Hardware, model: PreTrainedModel, sharding: Sharding, updates: int, packs: int
) -> list[Part]:
    """Bytes that one device sends, by rings; `packs` of one device in an optimizer step."""
    parts = []
    size = 2 if config.model.dtype == "bfloat16" else 4
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    link = hardware.link if sharding.devices <= hardware.node else hardware.network
    if sharding.devices > 1:
        ring = (sharding.devices - 1) / sharding.devices
        gradients = ring * trained * (size if sharding.zero else 4) * updates
        if sharding.stage >= 2:  # each pack's gradients go to their owners at once
            parts.append(Part("communication", "gradients, reduce-scatter", gradients * packs, "B", link))
        else:
            parts.append(Part("communication", "gradients, reduce", gradients * (2 - sharding.zero), "B", link))
        if sharding.stage == 3:
            gathered = ring * parameters * size * 2 * packs * updates
            parts.append(Part("communication", "weights, all-gather", gathered, "B", link))
        elif sharding.zero:
            parts.append(Part("communication", "weights, all-gather", ring * trained * size * updates, "B", link))
    builder = engine_builder(config)
    if builder.own_weights and make_algorithm(config.algorithm).needs_rollouts:
        rate = hardware.memory if builder.shares_device() and sharding.stage < 3 else link
        parts.append(Part("communication", "weights to the engine", parameters * size, "B", rate))
    return parts
