"""Checkpoints that are complete or invisible, and the state they hold. Nothing here is pickled.

    checkpoints/step_40/
        manifest.json          size and SHA-256 of every other file, written last
        state.json             counters, generators
        optimizer.safetensors  and other named tensors; large ones in several files
        model/                 Hugging Face format; with LoRA, the adapters in peft's

A checkpoint is written under a hidden name, forced to disk, and then renamed. A process that is killed at any moment
leaves the checkpoints that were there, and at most a hidden folder, which the next save removes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.model import shards

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Named = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` has one entry per name, on the CPU, read when asked for; `model_dir` is the Hugging Face folder, if any."""

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    state: dict[str, Any]
    model_dir: Path | None


def save(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Named],
    state: dict[str, Any],
    write_model: Callable[[Path], None] | None,
    weights: Named | None = None,
    keep: int,
    world: World | None = None,
) -> Path:
    """Write `root/step_{step}` and drop all but the newest `keep` complete checkpoints. Returns its path.

    `tensors[name]` goes to name.safetensors (if it is large, to several files); `state` to state.json, floats exactly (NaN
    and infinity are a ValueError); `write_model(path)` fills the folder model/, `weights` its model.safetensors. A
    checkpoint of the same step is replaced. PactError if the disk is full or not writable: the earlier checkpoints are intact
    then.

    Every process of `world` has to call, with the same names in the same order; the lead process's `state` and `write_model`
    count. `root` must be one folder to all of them. One run at a time may save to `root`; others may read.
    """
    world = world or World()
    final = root / f"step_{step}"
    writer = _Writer(world)
    temporary = root / f".tmp-step_{step}-{world.broadcast_from_main(os.getpid, 'a checkpoint')}"
    try:
        writer.lead(lambda: _begin(root, temporary))
        for name, entries in tensors.items():
            writer.tensors(temporary, name, entries)
        if write_model:
            writer.lead(lambda: write_model(temporary / "model"))
        if weights is not None:
            writer.tensors(temporary / "model", "model", weights)
        writer.lead(lambda: _write_state(temporary / "state.json", state))
        described = writer.describe(temporary)
        writer.lead(lambda: _complete(temporary, final, step, described))
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        cure = "free some space or make the folder writable; earlier checkpoints are intact, go on with resume=auto"
        raise PactError(f"cannot save the checkpoint {final}: {reason}; {cure}") from error
    finally:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well
    if world.is_main:
        _prune(root, keep)
    return final


class _Writer:
    """What the processes write together. Whoever fails says so to the others, and all of them raise."""

    def __init__(self, world: World):
        self.world = world
        self._own: list[Path] = []

    def lead(self, write: Callable[[], object]) -> None:
        """Something that the lead process does."""
        error: Exception | None = None
        if self.world.is_main:
            try:
                write()
            except Exception as problem:
                error = problem
        self._agree(error)

    def tensors(self, folder: Path, name: str, entries: Named) -> None:
        pairs = entries.items() if isinstance(entries, Mapping) else entries
        self.lead(lambda: folder.mkdir(exist_ok=True))
        files, error = shards.write(folder, name, pairs, self.world.rank, self.world.size)
        self._own += files
        self._agree(error)

    def describe(self, folder: Path) -> dict[str, Any]:
        """Size and checksum of every file, each by the process that wrote it; other files are the lead's."""
        error, own = None, {}
        try:
            for path in self._own:
                _sync(path)
                own[path.relative_to(folder).as_posix()] = _describe(path)
        except OSError as problem:
            error = problem
        self._agree(error)
        known = {name: entry for part in self.world.all_gather(own, "a checkpoint") for name, entry in part.items()}
        if self.world.is_main:
            known |= {name: _describe(folder / name) for name in _files(folder) if name not in known}
        return known

    def _agree(self, error: Exception | None) -> None:
        told = self.world.all_gather(None if error is None else str(error), "a checkpoint")
        if error is not None:
            raise error
        for rank, other in enumerate(told):
            if other is not None:
                raise OSError(f"process {rank}: {other}")


def _begin(root: Path, temporary: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    temporary.mkdir()


def _write_state(path: Path, state: dict[str, Any]) -> None:
    path.write_text(json.dumps(state, allow_nan=False), encoding="utf-8")


def _complete(temporary: Path, final: Path, step: int, described: dict[str, Any]) -> None:
    """The manifest, everything to disk, and then the name under which it is seen."""
    manifest = {"step": step, "files": described}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync_tree(temporary)
    if final.exists():
        _discard(final)
    temporary.rename(final)
    _sync(final.parent)


def latest(root: Path, *, verify: bool = False) -> Path | None:
    """The newest complete checkpoint under `root`, or None.

    A damaged one is skipped with a warning that names the file. Sizes are always checked; `verify` also reads every
    file and checks its SHA-256.
    """
    for path in reversed(_steps(root)):
        problem = _problem(path, verify)
        if problem is None:
            return path
        log.warning("skipping the checkpoint %s: %s", path, problem)
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; PactError if it is damaged. Optimizer and generators are restored by the functions below."""
    problem = _problem(path)
    if problem:
        raise PactError(f"{path} is not a complete checkpoint: {problem}; delete it to go on from an older one")
    try:
        names = {file: re.sub(r"-\d{5}$", "", file.stem) for file in sorted(path.glob("*.safetensors"))}
        tensors = {
            name: shards.TensorFiles(file for file in names if names[file] == name)
            for name in sorted(set(names.values()))
        }
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PactError(f"{path} is damaged: {reason}; delete it to go on from an older checkpoint") from None
    model_dir = path / "model"
    return Checkpoint(_read_manifest(path)["step"], tensors, state, model_dir if model_dir.is_dir() else None)


# -- generators ------------------------------------------------------------------------------------------------------


def rng_state() -> tuple[dict[str, Any], Tensors]:
    """The global generators: (Python's and numpy's as JSON data, torch's as tensors, one more per CUDA device)."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy}
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": device for i, device in enumerate(torch.cuda.get_rng_state_all())}
    return state, tensors


def set_rng_state(state: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `rng_state` took. Devices that this machine lacks are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


# -- metrics ---------------------------------------------------------------------------------------------------------


def rewind_metrics(path: Path, size: int) -> None:
    """Cut metrics.jsonl back to the `size` bytes that it had at a checkpoint.

    A resumed run repeats what came after, which would otherwise stand there twice. If the file has lost bytes since (a full
    disk, a torn copy), its whole lines are kept.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    if len(data) < size:
        size = data.rfind(b"\n") + 1
    os.truncate(path, size)
    _sync(path)


# -- folders ---------------------------------------------------------------------------------------------------------


def _steps(root: Path) -> list[Path]:
    """Checkpoint folders, complete or not, oldest first."""
    found = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _describe(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def _problem(path: Path, verify: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = _read_manifest(path)["files"]
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is damaged"
    for name, expected in files.items():
        file = path / name
        try:
            size = file.stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        if verify and _sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written (SHA-256)"
    return None


def _prune(root: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` complete checkpoints. Damaged newer ones wait to be replaced."""
    steps = _steps(root)
    complete = [path for path in steps if _problem(path) is None]
    for path in steps[: steps.index(complete[-keep:][0])]:
        _discard(path)


def _discard(path: Path) -> None:
    """Hide a checkpoint at once, then delete it: a half-deleted one is never seen."""
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _remove_leftovers(root: Path) -> None:
    """Delete the hidden folders of dead processes. One with our own id is a leftover too: ids come again."""
    for path in root.iterdir():
        found = re.fullmatch(r"\.(?:tmp|trash)-step_\d+-(\d+)", path.name)
        if found and (int(found[1]) == os.getpid() or not _alive(int(found[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is somebody else's
        pass
    return True


def _sync_tree(folder: Path) -> None:
    """Force files and folders to disk, each folder after its content."""
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
    """(folder of the base model that the run has made, model folder of its newest complete checkpoint); None where missing."""
    base, found = run / "base", latest(run / "checkpoints")
    return (base if (base / "config.json").exists() else None), (found / "model" if found else None)
