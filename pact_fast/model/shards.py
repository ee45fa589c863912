"""Named tensors in sharded safetensors files.

`write` is for checkpoints: all ranks write in parallel, and the result does not depend on their number.
`write_model_shards` is for a single rank that hands weights to another program. `TensorFiles` reads tensors one at a
time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SHARD_BYTES = 2 << 30  # of a file of `write`; a rank holds two of them in memory at a time
MODEL_SHARD_BYTES = 1 << 30  # of a file of `write_model_shards`; the rank holds one of them at a time


def write(
    folder: Path, name: str, tensors: Iterable[tuple[str, torch.Tensor]], rank: int = 0, size: int = 1
) -> tuple[list[Path], Exception | None]:
    """Write `folder/name.safetensors`, or `name-00000.safetensors` and so on with Hugging Face's index.

    A partitioned tensor has to be gathered by all ranks, so every rank iterates over all tensors in the same order.
    Each rank keeps the tensors of every `size`-th file and writes a file while the next one is filled. The iterable is
    exhausted even after an error, because other ranks would wait for this one.

    Args:
        folder: An existing folder.
        name: Name of the file without its suffix.
        tensors: (name, tensor) pairs.
        rank: Number of this rank.
        size: Number of ranks that call.

    Returns:
        The files that this rank has written, and the first error, if any.
    """
    writer = _ShardWriter(folder, name, rank, size)
    with ThreadPoolExecutor(1) as pool:
        for key, tensor in tensors:
            writer.add(pool, key, tensor)
        writer.flush(pool)
        error = writer.wait()
    if error is None and writer.number > 1 and rank == 0:
        try:
            writer.write_index()
        except OSError as problem:
            error = problem
    return writer.files, error


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


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})  # transformers requires the metadata


def _write_index(path: Path, file_of: dict[str, str], metadata: dict[str, Any]) -> None:
    index = {"metadata": metadata, "weight_map": file_of}
    path.write_text(json.dumps(index, indent=1), encoding="utf-8")


class _ShardWriter:
    """Fills one file after the other, and writes those of this rank in a background thread."""

    def __init__(self, folder: Path, name: str, rank: int, size: int):
        self.folder, self.name, self.rank, self.ranks = folder, name, rank, size
        self.number, self.size = 0, 0  # of the file that is being filled, and its bytes so far
        self.pending: dict[str, torch.Tensor] = {}  # tensors of that file, if this rank writes it
        self.file_number: dict[str, int] = {}  # tensor name → number of its file
        self.files: list[Path] = []
        self.writing: Future | None = None
        self.error: Exception | None = None

    def add(self, pool: ThreadPoolExecutor, key: str, tensor: torch.Tensor) -> None:
        if self.size and self.size + tensor.nbytes > SHARD_BYTES:
            self.flush(pool)
        self.size += tensor.nbytes
        self.file_number[key] = self.number
        if self.number % self.ranks == self.rank and self.error is None:
            self.pending[key] = _cpu_copy(tensor)

    def flush(self, pool: ThreadPoolExecutor) -> None:
        """Begin to write the current file, and start the next one."""
        no_tensors = self.number == 0 and not self.file_number  # readers expect a file all the same
        if self.pending or (no_tensors and self.rank == 0 and self.error is None):
            self.wait()
            path = self.path(self.number)
            self.files.append(path)
            self.writing = pool.submit(_save_tensors, self.pending, path)
        self.pending, self.size = {}, 0
        self.number += 1

    def wait(self) -> Exception | None:
        """Wait for the file that is being written. Returns the first error so far."""
        if self.writing is not None:
            self.error = self.error or self.writing.exception()  # type: ignore[assignment]
            self.writing = None
        return self.error

    def path(self, number: int) -> Path:
        """The first file has no number until it is known that there are several."""
        return self.folder / (f"{self.name}-{number:05d}.safetensors" if number else f"{self.name}.safetensors")

    def write_index(self) -> None:
        """Rename the first file, which readers would take for the only one, and write the index."""
        first = self.folder / f"{self.name}-00000.safetensors"
        self.path(0).rename(first)
        self.files[0] = first
        path = self.folder / f"{self.name}.safetensors.index.json"
        _write_index(path, {key: f"{self.name}-{n:05d}.safetensors" for key, n in self.file_number.items()}, {})
        self.files.append(path)


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
