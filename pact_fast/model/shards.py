"""Named tensors in safetensors files.

`write_file` writes one, hashed on the way. `write_model_shards` is for a single rank that hands weights to another
program. Checkpoints, which all ranks write in the background, are in snapshot.py; tensor_files.py reads them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
MODEL_SHARD_BYTES = 1 << 30  # of a file of `write_model_shards`; the rank holds one of them at a time
WRITE_BYTES = 16 << 20  # bytes that are hashed and written at a time
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class FileDigest(NamedTuple):
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


def write_model_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write weights as `model-00001.safetensors` and so on with Hugging Face's index, one file in memory at a time.

    Only this rank writes. Raises OSError if a file cannot be written; files written so far are left in `folder`.
    """
    file_of: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(_shards(tensors, MODEL_SHARD_BYTES), start=1):
        file = f"model-{number:05d}.safetensors"
        try:
            _save_tensors(shard, folder / file)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"cannot write {folder / file}: {error}") from error
        file_of |= dict.fromkeys(shard, file)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()  # before the next file is filled
    write_index(folder / "model.safetensors.index.json", file_of, {"total_size": total_bytes})


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Consecutive tensors, copied to the CPU, in groups of at most `max_bytes` (or one tensor)."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = host_copy(tensor)
        size += tensor.nbytes
    if shard:
        yield shard


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU, also of a tensor that is there: a gathered one is released when the iterator moves on.

    One thread copies: in the background, all of torch's would take the cores from those that compute.
    """
    source = tensor.detach()
    target = torch.empty(source.shape, dtype=source.dtype)
    if source.device.type == "cpu" and source.is_contiguous():
        np.copyto(_bytes(target), _bytes(source))
    else:
        target.copy_(source)
    return target


def write_file(tensors: Tensors, path: Path) -> FileDigest:
    """Write tensors on the CPU to a safetensors file, flushed to disk, and hash it on the way. OSError if that fails.

    The format: 8 bytes with the length of the header, little-endian; the header, JSON; the bytes of the tensors, the
    widest types first, so that all are aligned.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for key in order:
        tensor = tensors[key]
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    head: Iterable[bytes | memoryview] = (struct.pack("<Q", len(text)), text)
    with path.open("wb", buffering=0) as file:
        for part in itertools.chain(head, (_bytes(tensors[key].contiguous()).data for key in order)):
            for start in range(0, len(part), WRITE_BYTES):
                piece = memoryview(part)[start : start + WRITE_BYTES]
                digest.update(piece)
                while len(piece):
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return FileDigest(8 + len(text) + end, digest.hexdigest())


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})  # transformers requires the metadata


def write_index(path: Path, file_of: dict[str, str], metadata: dict[str, Any]) -> None:
    """Write Hugging Face's index of a model in several files: `file_of` maps tensors to names of files."""
    index = {"metadata": metadata, "weight_map": file_of}
    path.write_text(json.dumps(index, indent=1), encoding="utf-8")
