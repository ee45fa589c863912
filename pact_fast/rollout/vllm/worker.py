"""Runs inside vLLM's workers: reports fingerprints of the weights that they compute with, under checkpoint names.

vLLM mixes `WeightReport` into its worker class (`worker_extension_cls`). A server of your own is started with

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls pact_fast.rollout.vllm.worker.WeightReport …
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pact_fast.kernels.fingerprint import fingerprint
from pact_fast.model.weights import WeightShard

READ_BACK_COLUMNS = 256  # of the identity, by which a repacked matrix is multiplied at a time to read it back


class WeightReport:
    """Methods added to vLLM's worker class; `self` is the worker. Results are JSON, as they may pass through HTTP."""

    def pact_finish_loading(self, version: int | str) -> None:
        """Called after new weights: repair what vLLM's reload leaves stale, and store the version."""
        module: Any
        for module in self._pact_model().modules():
            # A head tied to the embedding is not in the checkpoint, so a reload skips it. On a CPU it multiplies with a
            # repacked copy of the embedding, which would keep the old weights.
            if hasattr(module, "cpu_linear") and hasattr(module, "shard_indices"):
                module.quant_method.process_weights_after_loading(module)
        self._pact_version = int(version)

    def pact_report_weights(self) -> dict:
        """{version, shards} of the weights in use, version -1 before the first; {error} if they cannot be read."""
        try:
            dtype = self.vllm_config.model_config.dtype  # type: ignore[attr-defined]
            with torch.inference_mode():
                found = [list(shard) for shard in weight_shards(self._pact_model(), dtype)]
        except NotImplementedError as error:
            return {"error": str(error)}
        return {"version": getattr(self, "_pact_version", -1), "shards": found}

    def pact_report_adapter(self) -> dict:
        """{version, shards} of the adapter that was loaded last."""
        with torch.inference_mode():
            found = [list(shard) for shard in adapter_shards(self._pact_model())]
        return {"version": getattr(self, "_pact_version", -1), "shards": found}

    def pact_transfer_backend(self) -> str | None:
        """The backend of vLLM's weight transfer API that this server was started with."""
        config = getattr(self.vllm_config, "weight_transfer_config", None)  # type: ignore[attr-defined]
        return config and config.backend

    def _pact_model(self) -> torch.nn.Module:
        return self.model_runner.get_model()  # type: ignore[attr-defined]


def weight_shards(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[WeightShard]:
    """Every weight of vLLM's model on this device, under checkpoint names; fused matrices are split again.

    `dtype` is that of the weights as they were sent.
    """
    packed = _packed_names(model)
    done: set[int] = set()
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer")  # under an adapter
        shards = _matrix_shards(name, module, packed)
        if shards is None:
            shards = _replicated_shards(name, module, done, dtype)
        else:
            done |= {id(parameter) for parameter in module.parameters(recurse=False)}
        yield from shards


def _packed_names(model: torch.nn.Module) -> dict[str, list[str]]:
    """Names of the checkpoint's matrices in every fused layer, in order; a matrix with several parts there is repeated."""
    packed = dict(getattr(model, "packed_modules_mapping", {}))
    for module in model.modules():
        stacked = getattr(getattr(module, "hf_to_vllm_mapper", None), "orig_to_new_stacked", None) or {}
        for fused in {layer for layer, index in stacked.values() if isinstance(index, tuple)}:
            parts = {
                i: name.strip(".")
                for name, (layer, index) in stacked.items()
                if layer == fused
                for i in (index if isinstance(index, tuple) else (index,))
            }
            packed[fused.strip(".")] = [parts[i] for i in sorted(parts)]
    return packed


def _matrix_shards(name: str, module: Any, packed: dict[str, list[str]]) -> Iterator[WeightShard] | None:
    """Shards of a linear layer, embedding or layer of experts; None for any other module."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, LinearBase):
        return _linear(name, module, packed)
    if isinstance(module, VocabParallelEmbedding):
        return _embedding(name, module)
    if hasattr(module, "w13_weight"):
        return _experts(name, module)
    return None


def _replicated_shards(name: str, module: torch.nn.Module, done: set[int], dtype: torch.dtype) -> Iterator[WeightShard]:
    """Norms and other parameters that every device holds whole."""
    for key, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in done:
            done.add(id(parameter))
            yield _shard(f"{name}.{key}", _as_sent(parameter, dtype))


def _as_sent(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A parameter that vLLM holds in fp32 (decays of delta rules), in the dtype that was sent if that holds its values."""
    sent = parameter.to(dtype)
    return sent if torch.equal(sent.to(parameter.dtype), parameter) else parameter


def _shard(name: str, tensor: torch.Tensor, row: int = 0, col: int = 0) -> WeightShard:
    rows = len(tensor) if tensor.ndim else 1
    return WeightShard(name, row, col, rows, tensor.numel() // max(rows, 1), fingerprint(tensor, row, col))


def _linear(name: str, module: Any, packed: dict[str, list[str]]) -> Iterator[WeightShard]:
    from vllm.model_executor.layers.linear import RowParallelLinear

    matrix, bias = _matrix(module), getattr(module, "bias", None)
    parts = _fused_parts(module, len(matrix))
    names = _fused_names(name, len(parts), packed)
    above: dict[str, int] = {}  # rows of the checkpoint's matrix that belong to earlier parts
    col = module.tp_rank * matrix.shape[1] if isinstance(module, RowParallelLinear) else 0
    local = 0
    for part, (row, rows) in zip(names, parts, strict=True):
        row += above.get(part, 0)
        above[part] = above.get(part, 0) + rows * getattr(module, "tp_size", 1)
        yield _shard(f"{part}.weight", matrix[local : local + rows], row, col)
        if bias is not None and bias.numel():
            yield _shard(f"{part}.bias", bias[local : local + rows], row)
        local += rows


def _fused_names(name: str, count: int, packed: dict[str, list[str]]) -> list[str]:
    """Checkpoint names of the matrices that vLLM has fused into one layer."""
    parent, _, leaf = name.rpartition(".")
    names = packed.get(leaf, [leaf]) if count > 1 else [leaf]
    if len(names) != count:
        raise NotImplementedError(f"{name} holds {count} matrices, the model names {names}")
    return [f"{parent}.{part}" if parent else part for part in names]


def _fused_parts(module: Any, total: int) -> list[tuple[int, int]]:
    """(first row in the checkpoint's matrix, number of rows) on this device of each fused matrix."""
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
    )

    if isinstance(module, QKVParallelLinear):
        q, k = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        v = module.num_kv_heads * module.v_head_size
        kv_rank = module.tp_rank // module.num_kv_head_replicas
        return [(module.tp_rank * q, q), (kv_rank * k, k), (kv_rank * v, v)]
    if isinstance(module, MergedColumnParallelLinear):
        return [(module.tp_rank * size, size) for size in module.output_partition_sizes]
    if isinstance(module, ColumnParallelLinear):
        return [(module.tp_rank * total, total)]
    return [(0, total)]


def _embedding(name: str, module: Any) -> Iterator[WeightShard]:
    """Without the rows that pad the vocabulary. A repacked copy that serves as head is reported as well."""
    indices = module.shard_indices
    first, rows = indices.org_vocab_start_index, indices.num_org_elements
    yield _shard(f"{name}.weight", module.weight[:rows], first)
    if hasattr(module, "cpu_linear"):
        yield _shard(f"{name}.weight", _read_back(module)[:rows], first)


def _experts(name: str, module: Any) -> Iterator[WeightShard]:
    """Experts one by one; w13 holds gate and up of an expert, this device's rows of each."""
    w13, w2 = module.w13_weight, module.w2_weight
    name, size = name.removesuffix(".routed_experts"), w13.shape[1] // 2
    if w13.device.type == "cpu":
        # its kernels need experts in their own layout, which a reload (0.32) does not restore: log-probs would be wrong
        raise NotImplementedError(
            f"{name}: vLLM's CPU build does not reload mixtures of experts; use another engine or a GPU"
        )
    if w13.ndim != 3 or w2.shape != (len(w13), w13.shape[2], size):
        raise NotImplementedError(f"{name}: the engine keeps its experts in a layout that cannot be read back")
    offset = module.moe_config.moe_parallel_config.tp_rank * size
    for slot, expert in enumerate(_local_experts(module)):
        prefix = f"{name}.{expert}"
        yield _shard(f"{prefix}.gate_proj.weight", w13[slot, :size], offset)
        yield _shard(f"{prefix}.up_proj.weight", w13[slot, size:], offset)
        yield _shard(f"{prefix}.down_proj.weight", w2[slot], 0, offset)


def _local_experts(module: Any) -> list[int]:
    """Global indices of this device's experts, in the order of their slots."""
    slots = getattr(module, "expert_map", None)
    if slots is None:
        return list(range(module.global_num_experts))
    local = [(slot, expert) for expert, slot in enumerate(slots.tolist()) if slot >= 0]
    return [expert for _, expert in sorted(local)]


def _matrix(module: Any) -> torch.Tensor:
    """The matrix [out, in] that a linear layer multiplies with on this device."""
    weight = module.weight
    if hasattr(module, "_cpu_unpacked_conv_weight"):
        return _read_back_convolution(module)
    if weight.ndim == 3:  # a causal convolution [channels, 1, width]
        return _whole_convolution(module, weight[:, 0])
    return weight if weight.ndim == 2 and weight.numel() else _read_back(module)


def _whole_convolution(module: Any, weight: torch.Tensor) -> torch.Tensor:
    if module.tp_size > 1:
        raise NotImplementedError("the engine divides the channels of a convolution over devices; use one device")
    return weight


def _read_back_convolution(module: Any) -> torch.Tensor:
    """Weights [channels, width] of a causal convolution with a kernel's own layout: its response to an impulse, reversed."""
    from vllm import _custom_ops as ops

    channels, width = module._cpu_unpacked_conv_weight.shape
    dtype = module._cpu_unpacked_conv_weight.dtype
    impulse = torch.zeros(width, channels, dtype=dtype)
    impulse[0] = 1
    response = ops.causal_conv1d_fwd_cpu(
        x=impulse.t(), weight=module.weight, bias=None,
        conv_states=torch.zeros(1, width - 1, channels, dtype=dtype).transpose(1, 2),
        query_start_loc=torch.tensor([0, width], dtype=torch.int32), cache_indices=torch.zeros(1, dtype=torch.int32),
        has_initial_state=torch.zeros(1, dtype=torch.bool), silu_activation=False, is_weight_packed=True,
    )  # fmt: skip
    return _whole_convolution(module, response.flip(1).contiguous())


def _read_back(module: Any) -> torch.Tensor:
    """W [out, in] of a kernel with its own weight layout, as W·I. Products with 0 and 1 are exact in any float type."""
    names = ("input_size_per_partition", "input_size", "embedding_dim")
    width = next(getattr(module, name) for name in names if hasattr(module, name))
    dtype = module.params_dtype if hasattr(module, "params_dtype") else module.weight.dtype
    columns = []
    for start in range(0, width, READ_BACK_COLUMNS):
        count = min(READ_BACK_COLUMNS, width - start)
        probe = torch.zeros(count, width, dtype=dtype)
        probe[torch.arange(count), start + torch.arange(count)] = 1
        columns.append(module.cpu_linear(probe, module.weight, None))
    return torch.cat(columns).t()


def adapter_shards(model: Any) -> Iterator[WeightShard]:
    """A and B of the newest adapter, from the buffers that vLLM multiplies with.

    Buffers have more rows or columns than the adapter's rank. They are fingerprinted whole: zeros add nothing to a
    fingerprint, and anything else changes it. Buffers of layers without an adapter are reported too, and must be zero.
    """
    from vllm.model_executor.layers.linear import LinearBase

    manager = model.lora_manager
    active = [(adapter, slot) for slot, adapter in enumerate(manager.lora_index_to_id) if adapter is not None]
    if not active:
        return
    adapter, slot = max(active)
    rank = manager.get_adapter(adapter).rank
    packed = getattr(model, "packed_modules_mapping", {})
    for name, module in manager.modules.items():
        if isinstance(getattr(module, "base_layer", None), LinearBase):
            yield from _adapter_linear(name, module, slot, rank, packed)
        elif any(buffer.any() for buffer in (*module.lora_a_stacked, *module.lora_b_stacked)):
            yield WeightShard(f"{name}.lora", 0, 0, 0, 0, 1)  # the trainer has adapters on linear layers only


def _adapter_linear(
    name: str, module: Any, slot: int, rank: int, packed: dict[str, list[str]]
) -> Iterator[WeightShard]:
    from vllm.model_executor.layers.linear import RowParallelLinear

    base = module.base_layer
    a = [buffer[slot, 0] for buffer in module.lora_a_stacked]
    b = [buffer[slot, 0] for buffer in module.lora_b_stacked]
    parts = _fused_parts(base, sum(map(len, b)))
    if len(parts) != len(b):
        raise NotImplementedError(f"{name} has {len(b)} adapters for {len(parts)} matrices")
    for part, (row, rows), down, up in zip(_fused_names(name, len(parts), packed), parts, a, b, strict=True):
        col = base.tp_rank * down.shape[1] if isinstance(base, RowParallelLinear) else 0
        yield WeightShard(f"{part}.lora_A.weight", 0, col, rank, down.shape[1], fingerprint(down, 0, col))
        yield WeightShard(f"{part}.lora_B.weight", row, 0, rows, rank, fingerprint(up, row))
