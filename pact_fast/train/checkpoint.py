"""Checkpoints that are complete or invisible, and the run state that they hold. Nothing is pickled.

    checkpoints/step_40/
        manifest.json          size and SHA-256 of every other file, written last
        state.json             counters, states of random number generators
        optimizer.safetensors  and other groups of named tensors; large groups in several files, sharded ones in files of each
                               rank, as fragments (model/tensor_files.py)
        model/                 Hugging Face format; with LoRA, the adapters in peft's format

Here they are found, checked and read; checkpoint_writer.py writes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from pact_fast.errors import PactError
from pact_fast.files import io_errors, remove, write_bytes
from pact_fast.model.tensor_files import TensorFiles
from pact_fast.text import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    step       training step
    tensors    groups of named tensors; each tensor is read from disk, to the CPU, when it is accessed
    state      content of state.json
    model_dir  the Hugging Face folder, None if there is none
    """

    step: int
    tensors: Mapping[str, TensorFiles]
    state: dict[str, Any]
    model_dir: Path | None


def latest(root: Path, *, verify: bool = False) -> Path | None:
    """The newest complete checkpoint under `root`, or None. Damaged ones are skipped with a warning that names the file.

    File sizes, state.json and the headers of tensor files are always checked; `verify` also reads every file and checks
    its SHA-256.
    """
    for path in reversed(checkpoint_folders(root)):
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
    try:
        tensors = _groups(path)
    except ValueError as error:
        raise PactError(
            f"{path} is not a complete checkpoint: {error}; delete it to continue from an older one"
        ) from None
    state = _read_object(path / "state.json")
    model_dir = path / "model"
    return Checkpoint(
        _read_object(path / "manifest.json")["step"], tensors, state, model_dir if model_dir.is_dir() else None
    )


def _groups(path: Path) -> dict[str, TensorFiles]:
    """ValueError: A sharded tensor is not complete."""
    names = {file: re.sub(r"-\d{5,}$", "", file.stem) for file in sorted(path.glob("*.safetensors"))}
    return {name: TensorFiles(file for file in names if names[file] == name) for name in sorted(set(names.values()))}


# -- metrics ---------------------------------------------------------------------------------------------------------


def rewind_metrics(path: Path, size: int) -> None:
    """Cut metrics.jsonl to the `size` bytes that it had at a checkpoint.

    A resumed run repeats the later steps, which would otherwise be recorded twice. If the file is shorter (full disk,
    incomplete copy), its complete lines are kept. The file is replaced, so that a copy by hard links (cp -al) of the
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


def checkpoint_folders(root: Path) -> list[Path]:
    """Checkpoints, complete or not, oldest first."""
    paths = [path for path in root.glob("step_*") if re.fullmatch(r"step_[0-9]{1,18}", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
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
        if verify and sha256(file) != digest:
            return f"{name} has changed since it was written (SHA-256)"
    return _damage(path)


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """(size, SHA-256) of every file by name. ValueError if manifest.json does not have the form that a save writes."""
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
    """Return a description of the damage if state.json or the header of a tensor file cannot be read, else None.

    File sizes have been checked before.
    """
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


def prune(root: Path, keep: int) -> None:
    """Remove checkpoints older than the newest `keep` complete ones. Newer damaged ones stay: a later save replaces them."""
    found = checkpoint_folders(root)
    complete = [path for path in found if problem(path) is None]
    for path in found[: found.index(complete[-keep:][0])]:
        hide_and_remove(path)


def hide_and_remove(path: Path) -> None:
    """Hide a checkpoint by renaming, then delete it: no reader sees a half-deleted one."""
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    path.rename(trash)
    with contextlib.suppress(OSError):
        remove(trash)


def run_weights(run: Path) -> tuple[Path | None, Path | None]:
    """Model folders of a run: its trained base model, and its newest complete checkpoint's; None where absent."""
    base, newest = run / "base", latest(run / "checkpoints")
    return (base if (base / "config.json").exists() else None), (newest / "model" if newest else None)
