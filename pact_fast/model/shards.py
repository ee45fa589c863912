"""Named tensors in safetensors files, written by all processes of a run in parallel, and read one at a time.

A tensor that is split over processes has to be gathered by all of them, so all go through the same tensors in the same order.
Each keeps those of every n-th file and writes them while the next ones come. What is read back does not depend on how many
processes wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

SHARD = 2 << 30  # bytes of a file; a process holds two of them at a time


def write(
    folder: Path, name: str, tensors: Iterable[tuple[str, torch.Tensor]], rank: int = 0, size: int = 1
) -> tuple[list[Path], Exception | None]:
    """Write `folder/name.safetensors`, or several files and Hugging Face's index of them.

    Returns (files that process `rank` of `size` has written, its first error). It goes through all tensors even after an
    error: the others would wait for it.
    """
    shard = _Shard(folder, name, rank, size)
    with ThreadPoolExecutor(1) as pool:
        for key, tensor in tensors:
            shard.add(pool, key, tensor)
        shard.flush(pool)
        error = shard.wait()
    if error is None and shard.number > 1 and rank == 0:
        try:
            shard.write_index()
        except OSError as problem:
            error = problem
    return shard.files, error


class _Shard:
    """The file that is being filled."""

    def __init__(self, folder: Path, name: str, rank: int, size: int):
        self.folder, self.name, self.rank, self.processes = folder, name, rank, size
        self.number, self.size = 0, 0
        self.held: dict[str, torch.Tensor] = {}
        self.where: dict[str, int] = {}  # key → number of its file
        self.files: list[Path] = []
        self.writing: Future | None = None
        self.error: Exception | None = None

    def add(self, pool: ThreadPoolExecutor, key: str, tensor: torch.Tensor) -> None:
        if self.size and self.size + tensor.nbytes > SHARD:
            self.flush(pool)
        self.size += tensor.nbytes
        self.where[key] = self.number
        if self.number % self.processes == self.rank and self.error is None:
            self.held[key] = tensor.detach().to("cpu", copy=True).contiguous()  # what was gathered is released again

    def flush(self, pool: ThreadPoolExecutor) -> None:
        if self.held:
            self.wait()
            path = self.path(self.number)
            self.files.append(path)
            self.writing = pool.submit(save_file, self.held, path, metadata={"format": "pt"})
        elif self.number == 0 and self.rank == 0 and not self.where and self.error is None:  # nothing is a file, too
            self.files.append(self.path(0))
            self.writing = pool.submit(save_file, {}, self.path(0), metadata={"format": "pt"})
        self.held, self.size = {}, 0
        self.number += 1

    def wait(self) -> Exception | None:
        if self.writing is not None:
            self.error = self.error or self.writing.exception()  # type: ignore[assignment]
            self.writing = None
        return self.error

    def path(self, number: int) -> Path:
        return self.folder / (f"{self.name}-{number:05d}.safetensors" if number else f"{self.name}.safetensors")

    def write_index(self) -> None:
        """The first file cannot keep its name: readers would take it for the only one."""
        first = self.folder / f"{self.name}-00000.safetensors"
        self.path(0).rename(first)
        self.files[0] = first
        index = {
            "metadata": {},
            "weight_map": {key: f"{self.name}-{number:05d}.safetensors" for key, number in self.where.items()},
        }
        path = self.folder / f"{self.name}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1), encoding="utf-8")
        self.files.append(path)


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of some files, read from disk when they are asked for."""

    def __init__(self, paths: Iterable[Path]):
        self._files = {path: safe_open(path, "pt") for path in paths}
        self._where = {key: file for file in self._files.values() for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._where[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
