"""Named tensors in sharded safetensors files.

`write` is for checkpoints: all ranks write in parallel, and the result does not depend on their number.
`write_model_shards` is for a single rank that hands weights to another program. `TensorFiles` reads tensors one at a
time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
SHARD_BYTES = 2 << 30  # of a file of `write`; without a budget, a rank holds two of them in memory at a time
MODEL_SHARD_BYTES = 1 << 30  # of a file of `write_model_shards`; the rank holds one of them at a time
PIECE = 16 << 20  # bytes that are hashed and written at a time
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class FileDigest(NamedTuple):
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


class BackgroundWriter:
    """Writes files of tensors in a thread, one after the other, each with its SHA-256 and flushed to disk.

    Args:
        budget: Bytes of tensors that may wait for the thread; `submit` waits where there would be more.
    """

    def __init__(self, budget: int = 0):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._budget, self._waiting = budget, 0
        self._tasks: deque[tuple[Future, int]] = deque()
        self._error: BaseException | None = None
        self._files: dict[Path, FileDigest] = {}

    def submit(self, tensors: Tensors, path: Path) -> None:
        """Write tensors, which nobody changes any more, to `path`."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        while self._tasks and self._waiting + size > self._budget:
            self._collect()
        self._waiting += size
        self._tasks.append((self._pool.submit(self._write, tensors, path), size))

    def then(self, work: Callable[[dict[Path, FileDigest]], None]) -> None:
        """Call work(files so far), which may change them, after the files that were submitted."""
        self._tasks.append((self._pool.submit(work, self._files), 0))

    def failed(self) -> bool:
        """Whether something that has ended could not be written."""
        while self._tasks and self._tasks[0][0].done():
            self._collect()
        return self._error is not None

    def done(self) -> bool:
        """Whether nothing is waiting or being written."""
        return self.failed() or not self._tasks

    def finish(self) -> dict[Path, FileDigest]:
        """Wait for all files. Raises the first error."""
        while self._tasks:
            self._collect()
        self._pool.shutdown()
        if self._error is not None:
            raise self._error
        return self._files

    def _collect(self) -> None:
        future, size = self._tasks.popleft()
        self._error = self._error or future.exception()
        self._waiting -= size

    def _write(self, tensors: Tensors, path: Path) -> None:
        if self._error is None:
            self._files[path] = write_file(tensors, path)
        tensors.clear()


def write(
    folder: Path,
    name: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    writer: BackgroundWriter,
    rank: int = 0,
    size: int = 1,
) -> None:
    """Write `folder/name.safetensors`, or `name-00000.safetensors` and so on with Hugging Face's index.

    A partitioned tensor has to be gathered by all ranks, so every rank iterates over all tensors in the same order.
    Each rank copies the tensors of every `size`-th file and hands them to the writer. Returns when all are copied; the
    iterable is exhausted even after an error, because other ranks would wait for this one.

    Args:
        folder: An existing folder.
        name: Name of the file without its suffix.
        tensors: (name, tensor) pairs.
        writer: Writes the files of this rank, and has their errors.
        rank: Number of this rank.
        size: Number of ranks that call.
    """
    shards = _ShardWriter(folder, name, writer, rank, size)
    for key, tensor in tensors:
        shards.add(key, tensor)
    shards.flush()
    if shards.number > 1 and rank == 0:
        writer.then(shards.write_index)


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
    _write_index(folder / "model.safetensors.index.json", file_of, {"total_size": total_bytes})


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Consecutive tensors, copied to the CPU, in groups of at most `max_bytes` (or one tensor)."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = _cpu_copy(tensor)
        size += tensor.nbytes
    if shard:
        yield shard


def _cpu_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy even of a tensor on the CPU: a gathered tensor is released when the iterator moves on."""
    return tensor.detach().to("cpu", copy=True).contiguous()


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
        for part in itertools.chain(head, (_bytes_of(tensors[key]) for key in order)):
            for start in range(0, len(part), PIECE):
                piece = memoryview(part)[start : start + PIECE]
                digest.update(piece)
                while len(piece):
                    piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return FileDigest(8 + len(text) + end, digest.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})  # transformers requires the metadata


def _write_index(path: Path, file_of: dict[str, str], metadata: dict[str, Any]) -> None:
    index = {"metadata": metadata, "weight_map": file_of}
    path.write_text(json.dumps(index, indent=1), encoding="utf-8")


class _ShardWriter:
    """Fills one file after the other, and hands those of this rank to the writer."""

    def __init__(self, folder: Path, name: str, writer: BackgroundWriter, rank: int, size: int):
        self.folder, self.name, self.writer, self.rank, self.ranks = folder, name, writer, rank, size
        self.number, self.size = 0, 0  # of the file that is being filled, and its bytes so far
        self.pending: Tensors = {}  # tensors of that file, if this rank writes it
        self.file_number: dict[str, int] = {}  # tensor name → number of its file

    def add(self, key: str, tensor: torch.Tensor) -> None:
        if self.size and self.size + tensor.nbytes > SHARD_BYTES:
            self.flush()
        self.size += tensor.nbytes
        self.file_number[key] = self.number
        if self.number % self.ranks == self.rank and not self.writer.failed():
            self.pending[key] = _cpu_copy(tensor)

    def flush(self) -> None:
        """Hand on the current file, and start the next one."""
        no_tensors = self.number == 0 and not self.file_number  # readers expect a file all the same
        if self.pending or (no_tensors and self.rank == 0):
            self.writer.submit(self.pending, self.path(self.number))
        self.pending, self.size = {}, 0
        self.number += 1

    def path(self, number: int) -> Path:
        """The first file has no number until it is known that there are several."""
        return self.folder / (f"{self.name}-{number:05d}.safetensors" if number else f"{self.name}.safetensors")

    def write_index(self, files: dict[Path, FileDigest]) -> None:
        """Rename the first file, which readers would take for the only one, and write the index."""
        if self.path(0) not in files:
            return  # it could not be written
        first = self.folder / f"{self.name}-00000.safetensors"
        self.path(0).rename(first)
        files[first] = files.pop(self.path(0))
        path = self.folder / f"{self.name}.safetensors.index.json"
        _write_index(path, {key: f"{self.name}-{n:05d}.safetensors" for key, n in self.file_number.items()}, {})


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of several safetensors files by name; each is read from disk when it is accessed."""

    def __init__(self, paths: Iterable[Path]):
        files = [safe_open(path, "pt") for path in paths]
        self._file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._file_of[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)
