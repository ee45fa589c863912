"""Checkpoints that are complete or invisible, and the run state that they hold. Nothing is pickled.

    checkpoints/step_40/
        manifest.json          size and SHA-256 of every other file, written last
        state.json             counters, states of random number generators
        optimizer.safetensors  and other groups of named tensors; large groups in several files
        model/                 Hugging Face format; with LoRA, the adapters in peft's format

A checkpoint is copied in memory, written to a hidden folder in the background, hashed on the way, flushed to disk, and then
renamed. A process that is killed at any moment leaves the earlier checkpoints intact, and at most a hidden folder, which
the next save removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pact_fast.distributed.world import World
from pact_fast.errors import PactError, error_line
from pact_fast.files import io_errors, remove, write_bytes
from pact_fast.model import shards
from pact_fast.text import one_line

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
NamedTensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    step       training step
    tensors    groups of named tensors; each tensor is read from disk, to the CPU, when it is accessed
    state      content of state.json
    model_dir  the Hugging Face folder, None if there is none
    """

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    state: dict[str, Any]
    model_dir: Path | None


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
    weights: NamedTensors | None = None,
    keep: int,
    world: World | None = None,
    budget: int = 0,
    before_rename: Callable[[], object] = lambda: None,
) -> PendingSave:
    """Begin to write `root/step_{step}`: returns when all tensors are copied, and writes the copies in a thread.

    A collective: all ranks call it with the same tensors in the same order. Files are written in parallel; `root` must be
    one folder for all ranks. Only one run at a time may save to `root`, and one save at a time may be pending. The
    checkpoint appears with `PendingSave.finish`, which replaces one of the same step and removes all but the newest `keep`
    complete ones.

    Args:
        root: Folder of the checkpoints.
        step: Training step.
        tensors: Groups of named tensors; group `name` goes to name.safetensors, large groups to several files.
        state: JSON data for state.json; floats are stored exactly. Rank 0's counts.
        write_model: Fills the folder model/ on rank 0; None for no such folder.
        weights: The model's weights, written to model/model.safetensors.
        keep: Number of complete checkpoints to keep.
        world: All ranks; default: one process.
        budget: Bytes of copies that a rank may hold; where there are more, the caller waits for the disk.
        before_rename: Called on rank 0 just before the checkpoint appears; may raise a PactError.

    Raises:
        PactError: The disk is full or not writable. Earlier checkpoints are intact.
        ValueError: `state` has a NaN or an infinity.
    """
    world = world or World()
    temporary = root / f".tmp-step_{step}-{world.broadcast_from_main(os.getpid, 'a checkpoint')}"
    pending = PendingSave(root / f"step_{step}", temporary, step, keep, world, budget, before_rename)
    with pending.errors():
        pending.on_main(lambda: _begin(root, temporary))
        for name, entries in tensors.items():
            pending.write(temporary, name, entries)
        if write_model:
            pending.on_main(lambda: write_model(temporary / "model"))
        if weights is not None:
            pending.write(temporary / "model", "model", weights)
        pending.on_main(lambda: _write_state(temporary / "state.json", state))
    return pending


class PendingSave:
    """A checkpoint that is being written. All ranks must call every method."""

    def __init__(
        self,
        final: Path,
        temporary: Path,
        step: int,
        keep: int,
        world: World,
        budget: int,
        before_rename: Callable[[], object],
    ):
        self._final, self._temporary, self._step, self._keep, self._world = final, temporary, step, keep, world
        self._before_rename = before_rename
        self._writer = shards.BackgroundWriter(budget)

    def ready(self) -> bool:
        """Whether `finish` would not wait: all ranks have written their files, or one has failed."""
        # of all ranks, so that they go on together; a failure on one must not wait for the others
        return not self._world.any(not self._writer.done(), "a checkpoint")

    def finish(self) -> Path:
        """Wait for the files, and make the checkpoint appear. Returns its path.

        Raises:
            PactError: A file could not be written. Earlier checkpoints are intact.
        """
        with self.errors():
            described = self._describe()
            self.on_main(lambda: _complete(self._temporary, self._final, self._step, described, self._before_rename))
        if self._world.is_main:
            _prune(self._final.parent, self._keep)
        return self._final

    def on_main(self, work: Callable[[], object]) -> None:
        """Call `work` on rank 0. Its error is raised on all ranks."""
        error: Exception | None = None
        if self._world.is_main:
            try:
                work()
            except Exception as caught:
                error = caught
        self._raise_on_all(error)

    def write(self, folder: Path, name: str, entries: NamedTensors) -> None:
        """Copy named tensors for folder/name.safetensors or several such files, each written by one of the ranks."""
        pairs = entries.items() if isinstance(entries, Mapping) else entries
        self.on_main(lambda: folder.mkdir(exist_ok=True))
        shards.write(folder, name, pairs, self._writer, self._world.rank, self._world.size)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn an error of the disk into a PactError; after any error, nothing is left of the checkpoint."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(Exception):
                self._writer.finish()
            if self._world.is_main:
                shutil.rmtree(self._temporary, ignore_errors=True)
            if not isinstance(error, (OSError, SafetensorError)):
                raise
            cure = (
                "free some space or make the folder writable; earlier checkpoints are intact, continue with resume=auto"
            )
            raise PactError(f"cannot save the checkpoint {self._final}: {error_line(error)}; {cure}") from error

    def _describe(self) -> dict[str, Any]:
        """Size and SHA-256 of every file, by the rank that wrote it; of files that are no tensors, by rank 0."""
        error, local = None, {}
        try:
            local = {
                path.relative_to(self._temporary).as_posix(): digest._asdict()
                for path, digest in self._writer.finish().items()
            }
        except Exception as caught:
            error = caught
        self._raise_on_all(error)
        files = {name: entry for part in self._world.all_gather(local, "a checkpoint") for name, entry in part.items()}
        self.on_main(
            lambda: files.update(
                {name: _describe(self._temporary / name) for name in _files(self._temporary) if name not in files}
            )
        )
        return files

    def _raise_on_all(self, error: Exception | None) -> None:
        """Raise an error of any rank on all ranks."""
        errors = self._world.all_gather(None if error is None else str(error), "a checkpoint")
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


def _complete(
    temporary: Path, final: Path, step: int, described: dict[str, Any], before_rename: Callable[[], object]
) -> None:
    """Write the manifest, flush everything to disk, and rename the folder to its final name."""
    manifest = {"step": step, "files": described}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync_tree(temporary)
    before_rename()
    if final.exists() or final.is_symlink():
        _remove(final)
    temporary.rename(final)
    _sync(final.parent)


def latest(root: Path, *, verify: bool = False) -> Path | None:
    """The newest complete checkpoint under `root`, or None. Damaged ones are skipped with a warning that names the file.

    File sizes, state.json and the headers of tensor files are always checked; `verify` also reads every file and checks
    its SHA-256.
    """
    for path in reversed(steps(root)):
        found = problem(path, verify)
        if found is None:
            return path
        log.warning("skipping the checkpoint %s: %s", path, found)
    return None


def load(path: Path) -> Checkpoint:
    """Open a checkpoint. PactError if it is damaged."""
    found = problem(path)
    if found:
        raise PactError(f"{path} is not a complete checkpoint: {found}; delete it to continue from an older one")
    names = {file: re.sub(r"-\d{5}$", "", file.stem) for file in sorted(path.glob("*.safetensors"))}
    tensors = {
        name: shards.TensorFiles(file for file in names if names[file] == name) for name in sorted(set(names.values()))
    }
    state = _read_object(path / "state.json")
    model_dir = path / "model"
    return Checkpoint(
        _read_object(path / "manifest.json")["step"], tensors, state, model_dir if model_dir.is_dir() else None
    )


# -- random number generators ----------------------------------------------------------------------------------------


def rng_state() -> tuple[dict[str, Any], Tensors]:
    """States of the global generators: Python's and numpy's as JSON data, torch's (CPU and each CUDA device) as tensors."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy}
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": device for i, device in enumerate(torch.cuda.get_rng_state_all())}
    return state, tensors


def set_rng_state(state: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned. States of CUDA devices that this machine lacks are ignored."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


# -- metrics ---------------------------------------------------------------------------------------------------------


def rewind_metrics(path: Path, size: int) -> None:
    """Cut metrics.jsonl to the `size` bytes that it had at a checkpoint.

    A resumed run repeats the later steps, which would otherwise be recorded twice. If the file is shorter (full disk,
    incomplete copy), its complete lines are kept. The file is written anew, so that a copy by hard links (cp -al) of the
    run directory keeps its own.
    """
    if not path.exists():
        return
    with io_errors(path):
        data = path.read_bytes()
        if len(data) < size:
            size = data.rfind(b"\n") + 1
        write_bytes(path, data[:size])


# -- folders ---------------------------------------------------------------------------------------------------------


def steps(root: Path) -> list[Path]:
    """Checkpoints, complete or not, oldest first."""
    paths = [path for path in root.glob("step_*") if re.fullmatch(r"step_[0-9]{1,18}", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _describe(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object. ValueError if the file holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def problem(path: Path, verify: bool = False) -> str | None:
    """Why a checkpoint is not complete; None if it is."""
    if not path.is_dir():
        return "it is not a folder"
    try:
        files = _manifest(path)
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, TypeError, OSError):
        return "manifest.json is damaged"
    for name, (size, digest) in files.items():
        file = path / name
        try:
            found = file.stat().st_size
        except (OSError, ValueError):
            return f"{one_line(name)} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if verify and _sha256(file) != digest:
            return f"{name} has changed since it was written (SHA-256)"
    return _damage(path)


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """(size, SHA-256) of every file by name. ValueError if manifest.json is not what `save` writes."""
    manifest = _read_object(path / "manifest.json")
    files = manifest.get("files")
    if not isinstance(manifest.get("step"), int) or not isinstance(files, dict) or "state.json" not in files:
        raise ValueError("not a manifest")
    found: dict[str, tuple[int, str]] = {}
    for name, entry in files.items():
        place = PurePosixPath(name)
        if not isinstance(entry, dict) or place.is_absolute() or ".." in place.parts:
            raise ValueError("not a manifest")
        found[name] = int(entry.get("size", -1)), str(entry.get("sha256"))
    return found


def _damage(path: Path) -> str | None:
    """What keeps files of the right sizes from being read: the state, or the header of a tensor file."""
    try:
        _read_object(path / "state.json")
    except (ValueError, OSError):
        return "state.json is damaged"
    for file in (*sorted(path.glob("*.safetensors")), *sorted(path.glob("model/*.safetensors"))):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return f"{file.relative_to(path)} has a damaged header"
    return None


def _prune(root: Path, keep: int) -> None:
    """Remove checkpoints older than the newest `keep` complete ones. Newer damaged ones stay: a later save replaces them."""
    found = steps(root)
    complete = [path for path in found if problem(path) is None]
    for path in found[: found.index(complete[-keep:][0])]:
        _remove(path)


def _remove(path: Path) -> None:
    """Hide a checkpoint by renaming, then delete it: no reader sees a half-deleted one."""
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    path.rename(trash)
    with contextlib.suppress(OSError):
        remove(trash)


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


def run_weights(run: Path) -> tuple[Path | None, Path | None]:
    """Model folders of a run: its trained base model, and its newest complete checkpoint's; None where absent."""
    base, newest = run / "base", latest(run / "checkpoints")
    return (base if (base / "config.json").exists() else None), (newest / "model" if newest else None)
