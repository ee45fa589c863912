"""Tensors as they are at a moment, written to files in the background, by all ranks in parallel.

`write` hands named tensors to the `SnapshotWriter` of its rank, whose thread writes the files. Tensors that will change
at a known time (weights and optimizer states, in the next optimizer step) are copied by the thread too, so that training
waits only if it gets there first. `write` deals the files of tensors that all ranks have; they do not depend on the number
of ranks. `write_own` is for tensors of which every rank has others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from pact_fast.model import shards
from pact_fast.model.shards import FileDigest, Tensors

SHARD_BYTES = 2 << 30  # of a file; without a budget, a rank holds two of them in memory at a time
Digests = dict[Path, FileDigest]


class Abandoned(Exception):
    """The files are no longer needed."""


class SnapshotWriter:
    """Copies tensors and writes them to files, in a thread; each file with its SHA-256 and flushed to disk.

    Files are written in the order of their submission. After an error the thread ends, and later files are dropped.

    Args:
        budget: Largest total of copies that wait to be written, in bytes; further copies wait for the disk.
        live: Tensors that keep their values until the owner has called `wait_copied`. They and views of them are copied
            in the thread.
    """

    def __init__(self, budget: int = 0, live: Iterable[torch.Tensor] = ()):
        self._budget = budget
        self._live = {tensor.untyped_storage().data_ptr() for tensor in live} - {0}
        self._changed = threading.Condition()
        self._to_copy: deque[_Task] = deque()
        self._to_write: deque[_Task] = deque()
        self._held = 0  # bytes of copies
        self._phases: tuple[Callable[[Digests], object], ...] | None = None  # known when nothing more will be submitted
        self._abandoned = self._ended = False
        self._error: BaseException | None = None
        self._files: Digests = {}
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    # -- for the thread that trains ----------------------------------------------------------------------------------

    def is_live(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor keeps its values until `wait_copied`, so that it need not be copied before."""
        return tensor.untyped_storage().data_ptr() in self._live

    def submit(self, task: _Task) -> None:
        """Copy and write a file. Waits where its copies, made already, and the earlier ones exceed the budget."""
        with self._changed:
            size = task.copied_bytes
            self._changed.wait_for(
                lambda: self._ended or not size or not self._held or self._held + size <= self._budget
            )
            if self._ended:
                return
            self._held += size
            self._to_copy.append(task)
            self._changed.notify_all()

    def close(self, *phases: Callable[[Digests], object]) -> None:
        """No more files follow. When they are written, the thread calls each of `phases` with their digests, and ends."""
        with self._changed:
            self._phases = phases
            self._changed.notify_all()

    def abandon(self) -> None:
        """Write nothing more than the file that is being written."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def abandoned(self, timeout: float) -> bool:
        """Whether `abandon` is called within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._abandoned, timeout)

    def wait_copied(self) -> None:
        """Wait until live tensors may change."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._to_copy)

    def wait_ended(self, timeout: float | None = None) -> BaseException | None:
        """Wait until the thread has ended, at most `timeout` seconds. Returns the error, or None."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended, timeout)
            return self._error

    def ended(self) -> bool:
        """Whether everything is done, or something went wrong."""
        return self._ended

    def failed(self) -> bool:
        """Whether something went wrong."""
        return self._error is not None

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while task := self._next():
                task()
            assert self._phases is not None
            for phase in self._phases:
                phase(self._files)
        except BaseException as caught:
            error = caught
        with self._changed:
            self._to_copy.clear()
            self._to_write.clear()
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _next(self) -> Callable[[], None] | None:
        """Return the next action, `_copy` or `_write`; None at the end. Copies come first while the budget lasts."""
        with self._changed:
            while True:
                if self._abandoned:
                    raise Abandoned("the checkpoint was given up")
                if self._to_copy and (not self._to_write or self._held + self._to_copy[0].live_bytes <= self._budget):
                    return self._copy
                if self._to_write:
                    return self._write
                if self._phases is not None:
                    return None
                self._changed.wait()

    def _copy(self) -> None:
        task = self._to_copy[0]
        with self._changed:
            self._held += task.live_bytes
        task.copy()
        with self._changed:
            self._to_write.append(self._to_copy.popleft())
            self._changed.notify_all()

    def _write(self) -> None:
        task = self._to_write.popleft()
        task.write(self._files)
        with self._changed:
            self._held -= task.copied_bytes + task.live_bytes
            self._changed.notify_all()


def write(
    folder: Path,
    name: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    writer: SnapshotWriter,
    rank: int = 0,
    size: int = 1,
) -> None:
    """Write `folder/name.safetensors`, or `name-00000.safetensors` and so on with Hugging Face's index.

    A partitioned tensor has to be gathered by all ranks, so every rank iterates over all tensors in the same order.
    Each rank takes the tensors of every `size`-th file; those that are not live are copied before this returns. The
    iterable is exhausted even after an error, because other ranks would wait for this one.

    Args:
        folder: An existing folder.
        name: Name of the file without its suffix.
        tensors: (name, tensor) pairs.
        writer: Writes the files of this rank, and has their errors.
        rank: Number of this rank.
        size: Number of ranks that call.
    """
    files = _Shards(folder, name, writer, rank, size)
    files.add_all(tensors)
    if files.number > 1 and rank == 0:
        writer.submit(_IndexTask(files))


def write_own(
    folder: Path,
    name: str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    writer: SnapshotWriter,
    rank: int = 0,
    size: int = 1,
) -> None:
    """Write the tensors of this rank to `folder/name-{rank:05d}.safetensors`, `name-{rank + size:05d}`, and so on.

    Nothing is collective. Arguments as of `write`.
    """
    _OwnShards(folder, name, writer, rank, size).add_all(tensors)


def write_now(
    folder: Path,
    name: str,
    buckets: Iterable[tuple[Tensors, Callable[[], Tensors]]],
    rank: int = 0,
    size: int = 1,
) -> Digests:
    """Write files as `write` does, at once, and of the tensors read those that this rank writes.

    Args:
        folder: An existing folder.
        name: Name of the file without its suffix.
        buckets: Tensors on the device "meta", and a function that returns the real ones.
        rank: Number of this rank.
        size: Number of ranks that call.

    Returns:
        The digests of this rank's files.
    """
    now = _WriteNow()
    files = _Shards(folder, name, now, rank, size)
    for meta, read in buckets:
        real: Tensors = {}
        for key, tensor in meta.items():
            if files.takes(tensor):
                real = real or read()
            files.add(key, real.get(key, tensor))
    files.flush()
    if files.number > 1 and rank == 0:
        now.submit(_IndexTask(files))
    return now.files


class _WriteNow:
    """Writes files at once when they are submitted, in place of a `SnapshotWriter`. No one else changes the tensors."""

    def __init__(self) -> None:
        self.files: Digests = {}

    def is_live(self, tensor: torch.Tensor) -> bool:
        return True

    def failed(self) -> bool:
        return False

    def submit(self, task: _Task) -> None:
        task.write(self.files)


class _Task(Protocol):
    """A file on its way. copied_bytes: of copies that it came with; live_bytes: of those that `copy` makes."""

    copied_bytes: int
    live_bytes: int

    def copy(self) -> None: ...

    def write(self, files: Digests) -> None:
        """Write the file, and add it to `files`."""


class _FileTask:
    """A file of tensors, some of them live."""

    def __init__(self, path: Path) -> None:
        self._path, self._tensors = path, Tensors()
        self._live: list[str] = []
        self._ready: tuple[torch.device, torch.cuda.Event] | None = None  # after the work that computes live tensors
        self.copied_bytes = self.live_bytes = 0

    def add(self, key: str, tensor: torch.Tensor, live: bool) -> None:
        if live:
            self._live.append(key)
            self._tensors[key] = tensor
            self.live_bytes += tensor.nbytes
            if tensor.is_cuda and self._ready is None:
                self._ready = tensor.device, torch.cuda.current_stream(tensor.device).record_event()
        else:  # a gathered tensor is released when the iterator moves on
            self._tensors[key] = shards.host_copy(tensor)
            self.copied_bytes += tensor.nbytes

    def copy(self) -> None:
        with _side_stream(self._ready):
            for key in self._live:
                self._tensors[key] = shards.host_copy(self._tensors[key])

    def write(self, files: Digests) -> None:
        files[self._path] = shards.write_file(self._tensors, self._path)
        self._tensors.clear()


@contextmanager
def _side_stream(ready: tuple[torch.device, torch.cuda.Event] | None) -> Iterator[None]:
    """A stream beside that of training, which waits for an event of that stream; nothing without a GPU."""
    if ready is None:
        yield
        return
    device, event = ready
    stream = torch.cuda.Stream(device)
    stream.wait_event(event)
    with torch.cuda.stream(stream):
        yield


class _Shards:
    """Fills one file after the other, and hands those of this rank to the writer."""

    def __init__(self, folder: Path, name: str, writer: SnapshotWriter | _WriteNow, rank: int, size: int):
        self.folder, self.name, self.writer, self.rank, self.ranks = folder, name, writer, rank, size
        self.number, self.size = 0, 0  # of the file that is being filled, and its bytes so far
        self.pending: _FileTask | None = None  # that file, if this rank writes it
        self.file_number: dict[str, int] = {}  # tensor name → number of its file

    def add_all(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Add all tensors, and hand on the last file."""
        for key, tensor in tensors:
            self.add(key, tensor)
        self.flush()

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether this rank writes the tensor if it is added next."""
        return self.is_own(self.number + self._is_full(tensor))

    def add(self, key: str, tensor: torch.Tensor) -> None:
        if self._is_full(tensor):
            self.flush()
        self.size += tensor.nbytes
        self.file_number[key] = self.number
        if self.is_own(self.number) and not self.writer.failed():
            self.pending = self.pending or _FileTask(self.path(self.number))
            self.pending.add(key, tensor.detach(), self.writer.is_live(tensor))

    def flush(self) -> None:
        """Hand on the current file, and start the next one."""
        no_tensors = self.number == 0 and not self.file_number  # readers expect a file all the same
        if no_tensors and self.rank == 0:
            self.pending = _FileTask(self.path(0))
        if self.pending:
            self.writer.submit(self.pending)
        self.pending, self.size = None, 0
        self.number += 1

    def is_own(self, number: int) -> bool:
        """Whether this rank writes the file."""
        return number % self.ranks == self.rank

    def _is_full(self, tensor: torch.Tensor) -> bool:
        return bool(self.size) and self.size + tensor.nbytes > SHARD_BYTES

    def path(self, number: int) -> Path:
        """The first file has no number until it is known that there are several."""
        return self.folder / (f"{self.name}-{number:05d}.safetensors" if number else f"{self.name}.safetensors")


class _OwnShards(_Shards):
    """All files are of this rank, and none is dealt."""

    def is_own(self, number: int) -> bool:
        return True

    def path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{self.rank + number * self.ranks:05d}.safetensors"


class _IndexTask:
    """The index of several files, after those of rank 0."""

    copied_bytes = live_bytes = 0

    def __init__(self, files: _Shards):
        self._shards = files

    def copy(self) -> None: ...

    def write(self, files: Digests) -> None:
        """Rename the first file, which readers would take for the only one, and write the index."""
        folder, name, unnumbered = self._shards.folder, self._shards.name, self._shards.path(0)
        first = folder / f"{name}-00000.safetensors"
        unnumbered.rename(first)
        files[first] = files.pop(unnumbered)
        file_of = {key: f"{name}-{number:05d}.safetensors" for key, number in self._shards.file_number.items()}
        shards.write_index(folder / f"{name}.safetensors.index.json", file_of, {})
