"""Checkpoints that are complete or invisible, and the state they hold. Nothing here is pickled.

    checkpoints/step_40/
        manifest.json          size and SHA-256 of every other file, written last
        state.json             counters, optimizer hyper-parameters, generators
        optimizer.safetensors  and other named tensor files
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pact_fast.errors import PactError

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` has one entry per safetensors file, on the CPU; `model_dir` is the Hugging Face folder, if any."""

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]
    model_dir: Path | None


def save(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Tensors],
    state: dict[str, Any],
    write_model: Callable[[Path], None] | None,
    keep: int,
) -> Path:
    """Write `root/step_{step}` and drop all but the newest `keep` complete checkpoints. Returns its path.

    `tensors[name]` goes to name.safetensors; `state` to state.json, floats exactly (NaN and infinity are a
    ValueError); `write_model(path)` fills the folder model/. A checkpoint of the same step is replaced. One process
    at a time may save to `root`; others may read. PactError if the disk is full or not writable: the earlier
    checkpoints are intact then.
    """
    final = root / f"step_{step}"
    temporary = root / f".tmp-step_{step}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        temporary.mkdir()
        for name, entries in tensors.items():
            save_file(entries, temporary / f"{name}.safetensors", metadata={"format": "pt"})
        (temporary / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        if write_model:
            write_model(temporary / "model")
        manifest = {"step": step, "files": {name: _describe(temporary / name) for name in _files(temporary)}}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync_tree(temporary)
        if final.exists():
            _discard(final)
        temporary.rename(final)
        _sync(root)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        cure = "free some space or make the folder writable; earlier checkpoints are intact, go on with resume=auto"
        raise PactError(f"cannot save the checkpoint {final}: {reason}; {cure}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well
    _prune(root, keep)
    return final


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
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PactError(f"{path} is damaged: {reason}; delete it to go on from an older checkpoint") from None
    model_dir = path / "model"
    return Checkpoint(_read_manifest(path)["step"], tensors, state, model_dir if model_dir.is_dir() else None)


# -- optimizer and generators ----------------------------------------------------------------------------------------


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]
) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, hyper-parameters as JSON data) of an optimizer whose state consists of tensors, such as AdamW.

    `names` gives every parameter's name. State `key` of a parameter is stored as "name/key".
    """
    tensors = {
        f"{names[parameter]}/{key}": value.detach().cpu().contiguous()
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    return tensors, {"param_groups": groups}


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], tensors: Tensors, state: dict[str, Any]
) -> None:
    """Put back what `optimizer_tensors` took, bit for bit. PactError if parameters or their groups have changed."""
    current = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in state["param_groups"]]
    if current != saved:
        odd = sorted({n for group in current for n in group} ^ {n for group in saved for n in group})
        difference = f"'{odd[0]}' is only in one of them" if odd else "their parameters are grouped differently"
        raise PactError(f"the saved optimizer does not fit the model: {difference}; resume with the run's own settings")
    number = {name: i for i, name in enumerate(name for group in saved for name in group)}
    entries: dict[int, Tensors] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        entries.setdefault(number[name], {})[key] = tensor.clone()  # the optimizer updates it in place
    groups = [
        {
            **{key: tuple(value) if isinstance(value, list) else value for key, value in group.items()},  # betas
            "params": [number[name] for name in group["params"]],
        }
        for group in state["param_groups"]
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def rng_state() -> tuple[dict[str, Any], Tensors]:
    """The global generators: (Python's and numpy's as JSON data, torch's as tensors, one more per CUDA device)."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {"python": random.getstate(), "numpy": numpy}
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": device for i, device in enumerate(torch.cuda.get_rng_state_all())}
    return state, tensors


def set_rng_state(state: dict[str, Any], tensors: Tensors) -> None:
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
