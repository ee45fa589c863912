"""Weights that are sent to an inference engine after an update, and their verification by fingerprints.

Trainer and engine hold the same values in different layouts: the engine fuses q, k, v and gate, up into one matrix,
splits matrices over its devices, and may repack them for its kernels. The engine therefore fingerprints, under their
checkpoint names, the parts of tensors that it computes with; the fingerprints of a tensor's parts add up to that of the
tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from pact_fast.errors import PactError
from pact_fast.kernels.fingerprint import MASK, fingerprint

BUCKET = 256 << 20  # bytes of weights that are gathered at a time under ZeRO-3
ExpectedWeights = dict[str, tuple[int, int, int]]  # tensor name → (rows, columns, fingerprint)


class WeightShard(NamedTuple):
    """A block of a checkpoint tensor as a worker of an engine holds it.

    name         of the tensor in the checkpoint
    row, col     first row and column of the block
    rows, cols   its size
    fingerprint  `fingerprint(block, row, col)` of `pact_fast.kernels.fingerprint`
    """

    name: str
    row: int
    col: int
    rows: int
    cols: int
    fingerprint: int


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a checkpoint tensor; the fields of vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightMismatch(PactError):
    """The engine's weights are not those that were sent."""


class WeightsUnavailable(PactError):
    """The engine needs its weights resent, but that version is no longer available."""

    def __init__(self, reason: str):
        super().__init__(
            f"the engine needs its weights resent, but {reason}; resume the run. With "
            "rollout.vllm_weight_transfer=files a copy is kept for such cases"
        )


class WeightSnapshot:
    """One version of the model's weights, as an iterable of (name, tensor) that fingerprints the tensors it yields.

    It is a `WeightSource` of vLLM. An engine that was restarted iterates once more; if the weights have changed since
    the first pass, or cannot be gathered again, that raises WeightsUnavailable.

    partitioned  whether ZeRO-3 has partitioned the weights, so that iterating is a collective operation
    expected     rows, columns and fingerprint of each tensor that was yielded
    bytes        size of the tensors that were yielded
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        self._model, self._dtype = model, dtype
        self._iterated = False
        self.partitioned = needs_all_ranks(model)
        self.expected: ExpectedWeights = {}
        self.bytes = 0

    def metadata(self) -> list[TensorSpec]:
        """The specs of all tensors, in the order of iteration. Nothing is gathered."""
        return list(checkpoint_shapes(self._model, self._dtype))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.check_available()
        self._iterated = True
        return self._fingerprinted()

    def check_available(self) -> None:
        """Raise WeightsUnavailable if a pass would need other ranks: they join the first pass only."""
        if self._iterated and self.partitioned:
            raise WeightsUnavailable("ZeRO-3 has partitioned them over ranks that have moved on")

    def _fingerprinted(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint_weights(self._model, self._dtype):
            found = shape_and_fingerprint(tensor)
            if name not in self.expected:
                self.expected[name] = found
                self.bytes += tensor.nbytes
            elif self.expected[name] != found:
                raise WeightsUnavailable(f"the trainer has changed them since ({name})")
            yield name, tensor


def shape_and_fingerprint(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(rows, columns, fingerprint) of a whole tensor."""
    rows = len(tensor) if tensor.ndim else 1
    return rows, tensor.numel() // max(rows, 1), fingerprint(tensor)


def checkpoint_weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight, with the names of a saved checkpoint.

    Tied weights appear once, floating-point tensors are cast to `dtype`, and adapters are left out. Under ZeRO-3, one
    bucket of at most 256 MiB (or one layer) is gathered at a time. Gathering is a collective operation: every rank has
    to exhaust the iterator, and a tensor is valid until the next one is requested.
    """
    for bucket in weight_buckets(model):
        with gathered(parameter for _, parameter in bucket):
            tensors = {name: parameter.detach() for name, parameter in bucket}
            for name, tensor in checkpoint_format(model, tensors).items():
                yield name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def checkpoint_shapes(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[TensorSpec]:
    """The specs of the tensors of `checkpoint_weights`. Nothing is gathered."""
    for bucket in weight_buckets(model):
        tensors = {
            name: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta") for name, p in bucket
        }
        for name, tensor in checkpoint_format(model, tensors).items():
            yield TensorSpec(name, dtype if dtype and tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))


def needs_all_ranks(model: PreTrainedModel) -> bool:
    """Whether ZeRO-3 has partitioned the weights, so that reading them is a collective operation."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def save_model_config(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and, for a model that has one, generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": model.dtype}
    type(model.config).from_dict(config).save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """(name of the head's weight, name of the embedding's) if they are one tensor; else None.

    A checkpoint holds such a tensor once.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names[id(head)], names[id(embedding)]


def verify(expected: ExpectedWeights, shards: Iterable[WeightShard]) -> None:
    """Compare the weights that were sent with the shards that the engine's workers report.

    Raises WeightMismatch if a tensor is missing, incomplete, unknown or different, or if two copies of a shard differ.
    """
    found: dict[str, dict[tuple[int, int], WeightShard]] = {}
    wrong = []
    for shard in shards:
        first = found.setdefault(shard.name, {}).setdefault((shard.row, shard.col), shard)
        if first != shard:  # devices may hold copies of the same shard
            wrong.append(f"{shard.name} (copies differ)")
    for name, (rows, cols, value) in expected.items():
        parts = found.pop(name, {}).values()
        if not parts:
            wrong.append(f"{name} (missing)")
        elif sum(part.rows * part.cols for part in parts) != rows * cols:
            wrong.append(f"{name} (incomplete)")
        elif sum(part.fingerprint for part in parts) & MASK != value:
            wrong.append(name)
    wrong += [f"{name} (unknown to the trainer)" for name in found]
    if wrong:
        shown = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise WeightMismatch(
            f"the engine does not hold the trainer's weights: {len(wrong)} of {len(expected)} tensors differ "
            f"({shown}); nothing was sampled from them. Resume the run; if it happens again, the engine loads weights wrongly"
        )


def base_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of a model without its adapters, with the names of a model that never had any."""
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            yield name.replace(".base_layer.", "."), parameter


def weight_buckets(model: PreTrainedModel) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    """Parameters in buckets of at most BUCKET bytes, or one layer.

    A layer is never divided, because converting its tensors to the checkpoint's format may need all of them.
    """
    bucket: list[tuple[str, torch.nn.Parameter]] = []
    size, last = 0, ""
    for name, parameter in base_parameters(model):
        layer = ".".join(part for part in name.split(".")[:3])
        count = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if bucket and layer != last and size + count > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size, last = size + count, layer
    if bucket:
        yield bucket


@contextmanager
def gathered(parameters: Iterable[torch.Tensor]) -> Iterator[bool]:
    """Gather the parameters that ZeRO-3 has partitioned while the context lasts; all ranks have to enter it.

    Yields whether there are any.
    """
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield True


def checkpoint_format(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and shapes as in a checkpoint, which engines read; transformers fuses the experts of a mixture on load."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)
