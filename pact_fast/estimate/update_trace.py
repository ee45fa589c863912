"""An update of the real model code on tensors without contents: any size, no weights are read, no memory is used."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import PreTrainedModel

from pact_fast.batch.packing import PackedBatch
from pact_fast.config import Config
from pact_fast.errors import PactError
from pact_fast.estimate.memory_tracker import MemoryKind, MemoryTracker
from pact_fast.estimate.workload import PackLoad
from pact_fast.kernels.head.chunked import balanced_chunk_rows, max_chunk_rows
from pact_fast.model.build import meta_model
from pact_fast.model.forward import decoder_of, tree_forward, unsupported
from pact_fast.model.patch import without_fused_kernels


@dataclass
class UpdateTrace:
    """The record of an update; parameters of the model, and those that train; `traffic`: see MemoryTracker, for each token."""

    record: MemoryTracker
    parameters: int
    trained: int
    traffic: float


def trace_update(
    config: Config, loads: Sequence[PackLoad], device: str, dtype: torch.dtype = torch.float32
) -> UpdateTrace:
    """What one update on these packs holds, in order of time.

    The operators run as on the CPU; `device` decides what differs on CUDA: the head's chunks, and norms and gated units in
    several steps. AdamW needs nothing beyond its states. With `dtype` bfloat16 the weights are so, and nothing is cast;
    AdamW is then left to who shards it.
    """
    tracker = MemoryTracker()
    autocast: AbstractContextManager = nullcontext()
    if config.model.dtype == "bfloat16" and dtype == torch.float32:
        autocast = torch.autocast("cpu", torch.bfloat16)
    model = meta_model(config, dtype)
    kernels: AbstractContextManager = nullcontext() if device == "cpu" else without_fused_kernels()
    with FakeTensorMode(), torch.device("cpu"), kernels:
        _to_cpu(model)
        with tracker:
            tracker.add([*model.parameters(), *model.buffers()], MemoryKind.WEIGHTS)
            trained = [p for p in model.parameters() if p.requires_grad]
            moments = [torch.empty_like(p) for p in trained for _ in range(2)] if dtype == torch.float32 else []
            tracker.add(moments, MemoryKind.OPTIMIZER)
            if device == "cpu":  # there the memory of logits is kept from pass to pass (kernels/runtime/scratch.py)
                head = model.get_output_embeddings().weight
                logits = torch.empty(max(_chunk(head, load.supervised, device) for load in loads), len(head))
                tracker.add([logits], MemoryKind.HEAD)
            for p in trained:
                p.register_post_accumulate_grad_hook(lambda p: tracker.add([p.grad], MemoryKind.GRADIENTS))
            _passes(model, loads, autocast, device, tracker)
    traffic = tracker.traffic / sum(len(load.batch) for load in loads)
    return UpdateTrace(tracker, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained), traffic)


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
    loads: Sequence[PackLoad],
    autocast: AbstractContextManager,
    device: str,
    tracker: MemoryTracker,
) -> None:
    """Forward, loss and backward of each pack, as the learner does it."""
    forward = tree_forward if unsupported(model) is None else _paths
    try:
        for load in loads:
            with autocast:
                hidden = forward(model, load.batch)
            tracker.kind = MemoryKind.HEAD
            loss = _Head.apply(hidden, model.get_output_embeddings().weight, load.supervised, device)
            tracker.kind = MemoryKind.ACTIVATIONS
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
    return decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)


def _chunk(weight: torch.Tensor, supervised: int, device: str) -> int:
    """Rows of logits that are there at a time."""
    return balanced_chunk_rows(supervised, max_chunk_rows(len(weight), 4 * len(weight), torch.device(device)))


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
