"""An update of the real model code on tensors without contents: any size, no weights are read, no memory is used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pact_fast.config import Config, ModelConfig
from pact_fast.errors import PactError
from pact_fast.kernels.head import balanced, chunk_rows
from pact_fast.planning.tracker import Kind, Tracker
from pact_fast.planning.workload import Load
from pact_fast.trainer import lora, setup
from pact_fast.tree import PackedBatch, tree_forward
from pact_fast.tree.fused import unfused
from pact_fast.tree.hf import trunk, unsupported


def architecture(model: ModelConfig) -> PretrainedConfig:
    """The model's transformers configuration; weights are not read."""
    if model.path:
        return setup.from_pretrained(AutoConfig, model.path, "model")
    settings = dict(model.random_init or {})
    try:
        return AutoConfig.for_model(settings.pop("model_type", "qwen3"), **settings)
    except (ValueError, TypeError, KeyError) as error:
        raise PactError(f"model.random_init: {' '.join(str(error).split())[:200]}") from None


def hollow_model(config: Config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The policy as training makes it, on the meta device: shapes alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(config.model), dtype=dtype)
        if config.model.gradient_checkpointing:
            setup.checkpoint_activations(model)
        if config.model.lora:
            lora.attach(model, config.model.lora, config.seed)
    return model.train()


@dataclass
class Rehearsal:
    """The record of an update; parameters of the model, and those that train; `traffic`: see Tracker, for each token."""

    record: Tracker
    parameters: int
    trained: int
    traffic: float


def rehearse(config: Config, loads: Sequence[Load], device: str, dtype: torch.dtype = torch.float32) -> Rehearsal:
    """What one update on these packs holds, in order of time.

    The operators run as on the CPU; `device` decides what differs on CUDA: the head's chunks, and norms and gated units in
    several steps. AdamW needs nothing beyond its states. With `dtype` bfloat16 the weights are so, and nothing is cast;
    AdamW is then left to who shards it.
    """
    tracker = Tracker()
    autocast: AbstractContextManager = nullcontext()
    if config.model.dtype == "bfloat16" and dtype == torch.float32:
        autocast = torch.autocast("cpu", torch.bfloat16)
    model = hollow_model(config, dtype)
    kernels: AbstractContextManager = nullcontext() if device == "cpu" else unfused()
    with FakeTensorMode(), torch.device("cpu"), kernels:
        _to_cpu(model)
        with tracker:
            tracker.add([*model.parameters(), *model.buffers()], Kind.WEIGHTS)
            trained = [p for p in model.parameters() if p.requires_grad]
            moments = [torch.empty_like(p) for p in trained for _ in range(2)] if dtype == torch.float32 else []
            tracker.add(moments, Kind.OPTIMIZER)
            if device == "cpu":  # there the memory of logits is kept from pass to pass (kernels/memory.py)
                head = model.get_output_embeddings().weight
                logits = torch.empty(max(_chunk(head, load.supervised, device) for load in loads), len(head))
                tracker.add([logits], Kind.HEAD)
            for p in trained:
                p.register_post_accumulate_grad_hook(lambda p: tracker.add([p.grad], Kind.GRADIENTS))
            _passes(model, loads, autocast, device, tracker)
    traffic = tracker.traffic / sum(len(load.batch) for load in loads)
    return Rehearsal(tracker, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained), traffic)


def _to_cpu(model: PreTrainedModel) -> None:
    """Meta tensors become tensors that claim to be on the CPU, so that operators are chosen as they are there."""
    made: dict[int, torch.Tensor] = {}  # tied weights stay one
    for module in model.modules():
        parts: list[dict[str, Any]] = [module._parameters, module._buffers]
        for held in parts:
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(copy, tensor.requires_grad) if is_weight else copy
                held[name] = made[id(tensor)]


def _passes(
    model: PreTrainedModel,
    loads: Sequence[Load],
    autocast: AbstractContextManager,
    device: str,
    tracker: Tracker,
) -> None:
    """Forward, loss and backward of each pack, as the learner does it."""
    forward = tree_forward if unsupported(model) is None else _paths
    try:
        for load in loads:
            with autocast:
                hidden = forward(model, load.batch)
            tracker.kind = Kind.HEAD
            loss = _Head.apply(hidden, model.get_output_embeddings().weight, load.supervised, device)
            tracker.kind = Kind.ACTIVATIONS
            del hidden
            loss.backward()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise PactError(
            f"{model.config.model_type}: its code asks for values of tensors ({error.func}), which an estimate does not "
            "have; measure a step instead, with trainer.max_steps=1"
        ) from None


def _paths(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Where trees do not serve: sequences of equal length, so that nothing is padded."""
    longest = max(span.q1 - span.q0 for span in batch.calls[0].spans)
    ids = torch.zeros(max(len(batch) // longest, 1), longest, dtype=torch.long)
    return trunk(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)


def _chunk(weight: torch.Tensor, supervised: int, device: str) -> int:
    """Rows of logits that are there at a time."""
    return balanced(supervised, chunk_rows(len(weight), 4 * len(weight), torch.device(device)))


class _Head(torch.autograd.Function):
    """What pact_loss holds, without its numbers: a chunk's logits, and both gradients from the forward pass on."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, supervised: int, device: str) -> torch.Tensor:
        vocab, width = weight.shape
        rows = _chunk(weight, supervised, device)
        grads = [t.new_empty(t.shape, dtype=torch.float32) for t in (hidden, weight) if t.requires_grad]
        columns = (width, width) if device == "cpu" else (vocab, width, width)
        chunk = [hidden.new_empty(rows, n, dtype=torch.float32) for n in columns]
        ctx.save_for_backward(*(t.to(hidden.dtype) for t in grads))
        del chunk
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, *_: torch.Tensor):
        grads = [*ctx.saved_tensors, None]
        return grads[0], grads[1], None, None
