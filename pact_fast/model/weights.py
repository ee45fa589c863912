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

BUCKET = 256 << 20  # bytes of weights that are gathered at a time under ZeRO-3
HASH_BLOCK = 1 << 22  # elements hashed at a time, which bounds the int64 temporaries
ExpectedWeights = dict[str, tuple[int, int, int]]  # tensor name → (rows, columns, fingerprint)


class WeightShard(NamedTuple):
    """A block of a checkpoint tensor as a worker of an engine holds it.

    name         of the tensor in the checkpoint
    row, col     first row and column of the block
    rows, cols   its size
    fingerprint  `fingerprint(block, row, col)`
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
    """One version of the model's weights, as an iterable of (name, tensor) that fingerprints what it yields.

    It is a `WeightSource` of vLLM. An engine that was restarted iterates once more; if the weights have changed since
    the first pass, or cannot be gathered again, that raises WeightsUnavailable.

    shared    whether ZeRO-3 has partitioned the weights, so that iterating is a collective operation
    expected  rows, columns and fingerprint of each tensor that was yielded
    bytes     size of the tensors that were yielded
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        self._model, self._dtype = model, dtype
        self._iterated = False
        self.shared = needs_all_ranks(model)
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
        if self._iterated and self.shared:
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


def fingerprint(tensor: torch.Tensor, row: int = 0, col: int = 0) -> int:
    """64-bit hash of the bits of a tensor [rows, …], viewed as a matrix, and of their positions in the whole matrix.

    Σ bits_ij · a_(row+i) · b_(col+j) mod 2⁶⁴ with odd pseudo-random a and b. Changing one element always changes the
    hash; changes of several elements go unnoticed with a probability of about 2⁻⁶⁰. The hashes of a matrix' blocks add
    up to its own. It detects faults, not tampering.

    Args:
        tensor: The block; any dtype of 1, 2, 4 or 8 bytes.
        row: Its first row in the whole matrix.
        col: Its first column in the whole matrix.
    """
    matrix = tensor.detach().reshape(len(tensor), -1) if tensor.ndim else tensor.detach().reshape(1, 1)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.element_size()]
    b = _coefficients(col, matrix.shape[1], matrix.device, 2)
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    step = max(1, HASH_BLOCK // max(matrix.shape[1], 1))
    for start in range(0, len(matrix), step):
        bits = matrix[start : start + step].contiguous().view(integers).to(torch.int64)
        a = _coefficients(row + start, len(bits), matrix.device, 1)
        total += ((bits * b).sum(1) * a).sum()
    return int(total) & 0xFFFF_FFFF_FFFF_FFFF


def shape_and_fingerprint(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(rows, columns, fingerprint) of a whole tensor."""
    return len(tensor), tensor.numel() // max(len(tensor), 1), fingerprint(tensor)


def _coefficients(start: int, count: int, device: torch.device, salt: int) -> torch.Tensor:
    """Odd int64 [count] computed from the indices by splitmix64, so that they are the same on every machine."""
    x = torch.arange(start + 1, start + count + 1, device=device).mul_(_signed(0x9E3779B97F4A7C15 * salt))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x | 1


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    return value - (1 << 64) if value >> 63 else value


def checkpoint_weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight, with the names of a saved checkpoint.

    Tied weights appear once, floating-point tensors are cast to `dtype`, and adapters are left out. Under ZeRO-3, one
    bucket of at most 256 MiB (or one layer) is gathered at a time. Gathering is a collective operation: every rank has
    to exhaust the iterator, and a tensor is valid until the next one is requested.
    """
    for bucket in _buckets(model):
        with gathered(parameter for _, parameter in bucket):
            tensors = {name: parameter.detach() for name, parameter in bucket}
            for name, tensor in _checkpoint_format(model, tensors).items():
                yield name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def checkpoint_shapes(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[TensorSpec]:
    """The specs of what `checkpoint_weights` yields. Nothing is gathered."""
    for bucket in _buckets(model):
        tensors = {
            name: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta") for name, p in bucket
        }
        for name, tensor in _checkpoint_format(model, tensors).items():
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
        elif sum(part.fingerprint for part in parts) & 0xFFFF_FFFF_FFFF_FFFF != value:
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


def _buckets(model: PreTrainedModel) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
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


def _checkpoint_format(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and shapes as in a checkpoint, which engines read; transformers fuses the experts of a mixture on load."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)
