"""What crosses to an inference engine after an update, and how both sides know that it arrived.

The trainer and the engine hold the same numbers in different shapes: the engine fuses q, k, v and gate, up into one matrix,
splits matrices over its devices, and may repack them for its kernels. Fingerprints are therefore taken of pieces under their
checkpoint names, from what the engine computes with; pieces of a matrix add up to the fingerprint of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from pact_fast.errors import PactError

BUCKET = 256 << 20  # bytes of weights that are whole at the same time under ZeRO-3
BLOCK = 1 << 22  # numbers hashed at a time
Expected = dict[str, tuple[int, int, int]]  # rows, columns and fingerprint of each tensor that was sent


class WeightShard(NamedTuple):
    """Rows [row, row + rows) and columns [col, col + cols) of a checkpoint tensor as an engine's worker holds them."""

    name: str
    row: int
    col: int
    rows: int
    cols: int
    fingerprint: int


class Shape(NamedTuple):
    """What is known of a checkpoint tensor before it is there; vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightMismatch(PactError):
    """The engine does not hold the weights that it was given."""


class WeightsUnavailable(PactError):
    """An engine has to be given its weights again, and they are there no more."""

    def __init__(self, reason: str):
        super().__init__(
            f"the engine has to be given its weights again, but {reason}; resume the run. With "
            "rollout.vllm_weight_transfer=files a copy is kept for the next time"
        )


class WeightSnapshot:
    """One version of the model's weights. Who goes through them, as vLLM's `WeightSource`, sends them; on the way they are
    fingerprinted.

    An engine that was started again is sent them once more: the same, or not at all.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        self._model, self._dtype = model, dtype
        self._begun = False
        self.shared = needs_all_ranks(model)
        self.expected: Expected = {}
        self.bytes = 0

    def metadata(self) -> list[Shape]:
        """Of all tensors in their order; nothing is gathered."""
        return list(checkpoint_shapes(self._model, self._dtype))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.check_alone()
        self._begun = True
        return self._pass()

    def check_alone(self) -> None:
        """WeightsUnavailable if it takes other processes to go through them once more: those do it once, when they are new."""
        if self._begun and self.shared:
            raise WeightsUnavailable("ZeRO-3 has split them over processes that no longer wait for it")

    def _pass(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint_weights(self._model, self._dtype):
            found = shape_and_fingerprint(tensor)
            if name not in self.expected:
                self.expected[name] = found
                self.bytes += tensor.nbytes
            elif self.expected[name] != found:
                raise WeightsUnavailable(f"the trainer has changed them since ({name})")
            yield name, tensor


def fingerprint(tensor: torch.Tensor, row: int = 0, col: int = 0) -> int:
    """64-bit hash of the bits of a tensor [rows, …], read as a matrix, and of their places in the whole matrix.

    Σ bits_ij · a_(row+i) · b_(col+j) mod 2⁶⁴ with odd pseudo-random a and b: one changed number always changes it, several
    with a chance of 2⁻⁶⁰ to go unseen, and pieces add up. It finds faults, not forgeries.
    """
    matrix = tensor.detach().reshape(len(tensor), -1) if tensor.ndim else tensor.detach().reshape(1, 1)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.element_size()]
    b = _coefficients(col, matrix.shape[1], matrix.device, 2)
    total = torch.zeros((), dtype=torch.int64, device=matrix.device)
    step = max(1, BLOCK // max(matrix.shape[1], 1))
    for start in range(0, len(matrix), step):
        bits = matrix[start : start + step].contiguous().view(integers).to(torch.int64)
        a = _coefficients(row + start, len(bits), matrix.device, 1)
        total += ((bits * b).sum(1) * a).sum()
    return int(total) & 0xFFFF_FFFF_FFFF_FFFF


def shape_and_fingerprint(tensor: torch.Tensor) -> tuple[int, int, int]:
    return len(tensor), tensor.numel() // max(len(tensor), 1), fingerprint(tensor)


def _coefficients(start: int, count: int, device: torch.device, salt: int) -> torch.Tensor:
    """Odd int64 numbers from their index (splitmix64), the same on every machine."""
    x = torch.arange(start + 1, start + count + 1, device=device).mul_(_signed(0x9E3779B97F4A7C15 * salt))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x | 1


def _signed(value: int) -> int:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    return value - (1 << 64) if value >> 63 else value


def checkpoint_weights(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight under the names of a saved checkpoint, tied ones once; floats cast to `dtype`.

    Of a model with adapters, the weights under them.

    Under ZeRO-3 one bucket of at most 256 MiB (or one layer) is gathered at a time, never the whole model. Every rank has
    to go through the whole iterator, as gathering is a collective operation.
    """
    for bucket in _buckets(model):
        with gathered(parameter for _, parameter in bucket):
            tensors = {name: parameter.detach() for name, parameter in bucket}
            for name, tensor in _checkpoint_format(model, tensors).items():
                yield name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def checkpoint_shapes(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[Shape]:
    """What `checkpoint_weights` yields, without the numbers and without gathering."""
    for bucket in _buckets(model):
        tensors = {
            name: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta") for name, p in bucket
        }
        for name, tensor in _checkpoint_format(model, tensors).items():
            yield Shape(name, dtype if dtype and tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))


def needs_all_ranks(model: PreTrainedModel) -> bool:
    """ZeRO-3 has split the weights, so that the run's processes can read them only all at once."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return several and any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def save_settings(model: PreTrainedModel, folder: Path) -> None:
    """What Hugging Face's readers need beside weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": model.dtype}
    type(model.config).from_dict(settings).save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """(name of the head, name of the embedding) if they are one tensor, which a checkpoint holds once."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names[id(head)], names[id(embedding)]


def verify(expected: dict[str, tuple[int, int, int]], pieces: Iterable[WeightShard]) -> None:
    """Compare {name: (rows, columns, fingerprint)} with what the engine's workers report; WeightMismatch if they differ."""
    found: dict[str, dict[tuple[int, int], WeightShard]] = {}
    wrong = []
    for piece in pieces:
        twin = found.setdefault(piece.name, {}).setdefault((piece.row, piece.col), piece)
        if twin != piece:  # a copy on another device
            wrong.append(f"{piece.name} (copies differ)")
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
            f"the engine does not hold the trainer's weights: {len(wrong)} of {len(expected)} tensors differ ({shown}); "
            "nothing was sampled from them. Resume the run; if it happens again, the engine's loading is at fault"
        )


def base_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters under their names in a model without adapters, and without those of adapters."""
    for name, parameter in model.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            yield name.replace(".base_layer.", "."), parameter


def _buckets(model: PreTrainedModel) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    """Parameters layer by layer, small layers together. A layer stays whole: its tensors may be converted together."""
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
    """Parameters that ZeRO-3 has split are whole while this lasts; whether there are any. All processes have to call."""
    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield True


def _checkpoint_format(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers fuses experts when it loads a mixture; checkpoints, which engines read, have them one by one."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)
