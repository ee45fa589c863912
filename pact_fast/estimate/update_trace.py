"""Traces one update of the real model code under FakeTensorMode: any size, no weights read, no memory allocated."""

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
    """Record of a traced update.

    record      allocations in order of time
    parameters  elements of the model's parameters
    trained     elements of the trained parameters
    traffic     bytes per token, see MemoryTracker
    """

    record: MemoryTracker
    parameters: int
    trained: int
    traffic: float


def trace_update(
    config: Config, loads: Sequence[PackLoad], device: str, dtype: torch.dtype = torch.float32
) -> UpdateTrace:
    """Trace forward, loss and backward on the given packs, one after another.

    Operators run as on the CPU, except where CUDA differs: chunk sizes of the head, and norms and gated units, which are
    fused on the CPU only. AdamW allocates nothing beyond its states.

    Args:
        config: Model, adapters, checkpointing and compute dtype.
        loads: Packs of the update.
        device: "cpu" or "cuda".
        dtype: Type of the weights. With bfloat16 (ZeRO) there is no autocast, and optimizer states are not counted here,
            because they are sharded.

    Raises:
        PactError: The model's code reads values of tensors, so it cannot be traced.
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
            if device == "cpu":  # the buffer of logits is kept between passes (kernels/runtime/scratch.py)
                head = model.get_output_embeddings().weight
                logits = torch.empty(max(_chunk(head, load.supervised, device) for load in loads), len(head))
                tracker.add([logits], MemoryKind.HEAD)
            for p in trained:
                p.register_post_accumulate_grad_hook(lambda p: tracker.add([p.grad], MemoryKind.GRADIENTS))
            _passes(model, loads, autocast, device, tracker)
    traffic = tracker.traffic / sum(len(load.batch) for load in loads)
    return UpdateTrace(tracker, sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained), traffic)


def _to_cpu(model: PreTrainedModel) -> None:
    """Replace meta tensors by fake CPU tensors, so that operators are dispatched as on the CPU."""
    made: dict[int, torch.Tensor] = {}  # by id, so that tied weights stay tied
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
    """Forward, loss and backward of each pack, as the learner runs them."""
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
            f"{model.config.model_type}: its code reads values of tensors ({error.func}), which a trace does not have; "
            "measure a step instead, with trainer.max_steps=1"
        ) from None


def _paths(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Forward pass of a model without tree attention: sequences of equal length, so that nothing is padded."""
    longest = max(span.q1 - span.q0 for span in batch.calls[0].spans)
    ids = torch.zeros(max(len(batch) // longest, 1), longest, dtype=torch.long)
    return decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)


def _chunk(weight: torch.Tensor, supervised: int, device: str) -> int:
    """Rows of logits that exist at a time."""
    return balanced_chunk_rows(supervised, max_chunk_rows(len(weight), 4 * len(weight), torch.device(device)))


class _Head(torch.autograd.Function):
    """Allocations of pact_loss without its arithmetic: logits of a chunk, and both gradients from the forward pass on."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, supervised: int, device: str) -> torch.Tensor:
        vocab, width = weight.shape
        rows = _chunk(weight, supervised, device)
        whole = hidden.dtype == torch.float32  # 16-bit types: only rows that a token reads have a sum (HiddenGradient)
        sums = [hidden.new_empty(len(hidden) if whole else min(supervised, len(hidden)), width, dtype=torch.float32)]
        sums += [weight.new_empty(weight.shape, dtype=torch.float32)] if weight.requires_grad else []
        columns = (width, width) if device == "cpu" else (vocab, width, width)
        chunk = [hidden.new_empty(rows, n, dtype=torch.float32) for n in columns]
        results = [sums[0] if whole else hidden.new_empty(hidden.shape), *(t.to(weight.dtype) for t in sums[1:])]
        ctx.save_for_backward(*results)
        del chunk
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, *_: torch.Tensor):
        grads = [*ctx.saved_tensors, None]
        return grads[0], grads[1], None, None
