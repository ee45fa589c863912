"""Saving a checkpoint during training: copied in memory, written to a hidden folder, and renamed when it is complete.

    start_save           every rank takes its share of the files; a thread on each copies and writes them
    wait_copied          training waits for the copies before the next optimizer step, which would change the tensors
    weights/             only for weights that ZeRO-3 has partitioned: rank N's thread writes its parts of them, and names the
                         files in written-N.json; rank 0's thread names all in written.json, from which all threads write the
                         files of the model
    .part-N.json         rank N's thread says that it has written its files, and their digests
    manifest, rename     rank 0's thread, when all parts are there

A process that is killed at any moment leaves the earlier checkpoints intact, and at most a hidden folder, which the next
save removes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pact_fast.distributed.world import World
from pact_fast.errors import PactError, error_line
from pact_fast.files import write_bytes
from pact_fast.model import snapshot
from pact_fast.model.sharded_weights import ShardedWeights
from pact_fast.model.tensor_files import TensorFiles
from pact_fast.train.checkpoint import hide_and_remove, prune, sha256

NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
FileTable = dict[str, dict[str, Any]]  # path in the folder → size and SHA-256, as in manifest.json
WEIGHTS = "weights"  # folder of the parts of weights, which is removed at the end
POLL_SECONDS = 0.05  # seconds between looks for the parts of other ranks
NOTE_TIMEOUT = 10.0  # seconds for other ranks' notes when this rank ends without them
AGREEMENT_SECONDS = 1.0  # seconds between the times when ranks tell each other whether a thread has failed


def save(root: Path, step: int, **arguments: Any) -> Path:
    """`start_save`, and wait until the checkpoint is complete. Returns its path. PactError: see `PendingSave.finish`."""
    return start_save(root, step, **arguments).finish()


def start_save(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, NamedTensors],
    state: dict[str, Any],
    write_model: Callable[[Path], None] | None,
    weights: NamedTensors | ShardedWeights | None = None,
    keep: int,
    sharded: Mapping[str, NamedTensors] | None = None,
    live: Iterable[torch.Tensor] = (),
    world: World | None = None,
    budget: int = 0,
    before_rename: Callable[[], object] = lambda: None,
    after_rename: Callable[[Path], object] = lambda path: None,
) -> PendingSave:
    """Begin to write `root/step_{step}` in a thread. Tensors may change when this returns, those in `live` later.

    A collective: all ranks call it with the same `tensors` and `weights` in the same order. Files are written in parallel;
    `root` must be one folder for all ranks. Only one run at a time may save to `root`, and one save at a time may be
    pending. The checkpoint appears as soon as all ranks have written their files; it replaces one of the same step, and all
    but the newest `keep` complete ones are removed. `PendingSave.finish` has the errors.

    Args:
        root: Folder of the checkpoints.
        step: Training step.
        tensors: Groups of named tensors; group `name` goes to name.safetensors, large groups to several files.
        state: JSON data for state.json; floats are stored exactly. Rank 0's counts.
        write_model: Fills the folder model/ on rank 0; None for no such folder.
        weights: The model's weights, written to model/model.safetensors, with `write_model`.
        keep: Number of complete checkpoints to keep.
        sharded: Like `tensors`, for groups of which every rank has other tensors: each writes its own.
        live: Tensors of this rank that keep their values until `PendingSave.wait_copied`: they are copied in the thread.
        world: All ranks; default: one process.
        budget: Bytes of copies that a rank may hold; where there are more, they wait for the disk.
        before_rename: Called on rank 0, in the thread, just before the checkpoint appears; may raise a PactError.
        after_rename: Called on rank 0, in the thread, with the path of the complete checkpoint.

    Raises:
        PactError: The disk is full or not writable. Earlier checkpoints are intact.
        ValueError: `state` has a NaN or an infinity.
    """
    world = world or World()
    temporary = root / f".tmp-step_{step}-{world.broadcast_from_main(os.getpid, 'a checkpoint')}"
    pending = PendingSave(root / f"step_{step}", temporary, world, snapshot.SnapshotWriter(budget, live))

    def complete(files: FileTable) -> None:
        _complete(temporary, pending.path, step, files, before_rename)
        prune(root, keep)
        after_rename(pending.path)

    with pending.errors():
        pending.on_main(lambda: _begin(root, temporary))
        for name, entries in tensors.items():
            pending.write(temporary, name, entries)
        for name, entries in (sharded or {}).items():
            pending.write(temporary, name, entries, snapshot.write_own)
        if write_model:
            pending.on_main(lambda: write_model(temporary / "model"))
        if isinstance(weights, ShardedWeights):
            pending.write(temporary / WEIGHTS, WEIGHTS, weights.parts(), snapshot.write_own)
        elif weights is not None:
            pending.write(temporary / "model", "model", weights)
        pending.on_main(lambda: _write_state(temporary / "state.json", state))
        pending.close(complete, weights if isinstance(weights, ShardedWeights) else None)
    return pending


class PendingSave:
    """A checkpoint that is being written. All ranks must call `ready`, `finish`, `on_main` and `write`.

    path  where it will be
    """

    def __init__(self, path: Path, temporary: Path, world: World, writer: snapshot.SnapshotWriter):
        self.path, self._temporary, self._world, self._writer = path, temporary, world, writer
        self._alone = False  # the other ranks may not be there any more

    def write(
        self, folder: Path, name: str, entries: NamedTensors, write: Callable[..., None] = snapshot.write
    ) -> None:
        """Take named tensors for folder/name.safetensors or several such files, each written by one of the ranks."""
        pairs = entries.items() if isinstance(entries, Mapping) else entries
        self.on_main(lambda: folder.mkdir(exist_ok=True))
        write(folder, name, pairs, self._writer, self._world.rank, self._world.size)

    def on_main(self, work: Callable[[], object]) -> None:
        """Call `work` on rank 0. Its error is raised on all ranks."""
        error: Exception | None = None
        if self._world.is_main:
            try:
                work()
            except Exception as caught:
                error = caught
        self._raise_on_all(error)

    def close(self, complete: Callable[[FileTable], None], weights: ShardedWeights | None) -> None:
        """No more files follow. Rank 0 calls `complete` in its thread when all ranks have written theirs.

        `weights`: whose parts have been written, and that the files of the model are to be written from.
        """

        def last(digests: snapshot.Digests) -> None:
            own = {path.relative_to(self._temporary).as_posix(): d._asdict() for path, d in digests.items()}
            own = {name: digest for name, digest in own.items() if not name.startswith(f"{WEIGHTS}/")}
            if self._world.is_main:
                others = self._files_of_others()
                if weights:
                    shutil.rmtree(self._temporary / WEIGHTS)  # or it would be a part of the checkpoint
                complete(others | own)
            else:
                write_bytes(self._part_path(self._world.rank), json.dumps(own).encode())

        phases = [functools.partial(self._write_model, weights)] if weights else []
        self._writer.close(*phases, last)

    def _write_model(self, weights: ShardedWeights, digests: snapshot.Digests) -> None:
        """Write this rank's files of the model, when all ranks have written their parts of the weights."""
        folder, rank = self._temporary / WEIGHTS, self._world.rank
        own = [path.name for path in digests if path.parent == folder]
        write_bytes(folder / f"written-{rank}.json", json.dumps(own).encode())
        if self._world.is_main:  # looks for the notes of all; the others for one
            notes = (self._wait_for_note(folder / f"written-{other}.json", other) for other in range(self._world.size))
            write_bytes(folder / "written.json", json.dumps([name for note in notes for name in note]).encode())
        listed = self._wait_for_note(folder / "written.json", 0)
        stored = functools.cache(lambda: TensorFiles(folder / name for name in listed))
        buckets = self._until_abandoned(weights.tensors(stored))
        digests |= snapshot.write_now(self._temporary / "model", "model", buckets, rank, self._world.size)

    def _until_abandoned(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if self._writer.abandoned(0):
                raise snapshot.Abandoned("the checkpoint was given up")
            yield item

    def wait_copied(self) -> None:
        """Wait until this rank has copied the live tensors, so that they may change."""
        self._writer.wait_copied()

    def ready(self) -> bool:
        """Whether `finish` would not wait: all ranks are done, or one has failed."""
        # of all ranks, so that they continue together; a failure on one must not wait for the others
        writer = self._writer
        working, failed = self._world.sum_counts(not writer.ended(), writer.failed())
        return bool(failed) or not working

    def finish(self) -> Path:
        """Wait until the checkpoint is complete. Returns its path.

        Raises:
            PactError: A file could not be written. Earlier checkpoints are intact.
        """
        with self.errors():
            while True:  # a thread may wait for one that has failed on another rank
                error = self._writer.wait_ended(AGREEMENT_SECONDS if self._world.size > 1 else None)
                if self.ready():
                    break
            self._raise_on_all(error if self._writer.failed() else None)
        return self.path

    def finish_alone(self) -> None:
        """End without the other ranks, which may not be there any more; the checkpoint is completed if they have done theirs.

        Errors are not reported: the checkpoint is then missing, and a resumed run uses an older one.
        """
        self._alone = True
        self._writer.wait_ended()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn an error of the disk into a PactError; after any error, nothing is left of the checkpoint."""
        try:
            yield
        except BaseException as error:
            self._writer.abandon()
            self._writer.wait_ended()
            if self._world.is_main:
                shutil.rmtree(self._temporary, ignore_errors=True)
            if not isinstance(error, (OSError, SafetensorError)):
                raise
            cure = (
                "free some space or make the folder writable; earlier checkpoints are intact, continue with resume=auto"
            )
            raise PactError(f"cannot save the checkpoint {self.path}: {error_line(error)}; {cure}") from error

    def _part_path(self, rank: int) -> Path:
        return self._temporary / f".part-{rank}.json"

    def _files_of_others(self) -> FileTable:
        """The files of all other ranks, when they are written. The notes about them are removed."""
        files: FileTable = {}
        for rank in range(1, self._world.size):
            part = self._part_path(rank)
            files |= self._wait_for_note(part, rank)
            part.unlink()
        return files

    def _wait_for_note(self, path: Path, rank: int) -> Any:
        """Wait for the note of another rank's thread, and return its content."""
        alone = 0.0
        while not path.exists():
            alone += POLL_SECONDS if self._alone else 0.0
            if self._writer.abandoned(POLL_SECONDS) or alone > NOTE_TIMEOUT:
                raise snapshot.Abandoned(f"rank {rank} has not written its part of the checkpoint")
        return json.loads(path.read_bytes())

    def _raise_on_all(self, error: BaseException | None) -> None:
        """Raise an error of any rank on all ranks, when none of them writes any more."""
        errors = self._world.all_gather(None if error is None else str(error), "a checkpoint")
        if not any(other is not None for other in errors):
            return
        self._writer.abandon()
        self._writer.wait_ended()
        self._world.all_gather(None, "a checkpoint")  # rank 0 removes the folder next
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                raise OSError(f"rank {rank}: {other}")


def _begin(root: Path, temporary: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    temporary.mkdir()


def _write_state(path: Path, state: dict[str, Any]) -> None:
    path.write_text(json.dumps(state, allow_nan=False), encoding="utf-8")


def _complete(temporary: Path, final: Path, step: int, files: FileTable, before_rename: Callable[[], object]) -> None:
    """Write the manifest, flush everything to disk, and rename the folder to its final name."""
    others = {name: _describe(temporary / name) for name in _names(temporary) if name not in files}
    manifest = {"step": step, "files": files | others}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync_tree(temporary)
    before_rename()
    if final.exists() or final.is_symlink():
        hide_and_remove(final)
    temporary.rename(final)
    _sync(final.parent)


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _describe(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def _remove_leftovers(root: Path) -> None:
    """Delete hidden folders of dead processes. One with our own process id is a leftover, too: ids are reused."""
    for path in root.iterdir():
        match = re.fullmatch(r"\.(?:tmp|trash)-step_\d+-(\d+)", path.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, owned by another user
        pass
    return True


def _sync_tree(folder: Path) -> None:
    """fsync files and folders, each folder after its content."""
    for directory, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(directory, name))
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
