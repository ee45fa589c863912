"""The run directory, and writes to it that are complete or absent.

config.yaml, summary.json, metrics.jsonl, tracking_id, tensorboard/, wandb/, tokenizer/, base/, rollouts/, checkpoints/,
report.html
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from pact_fast.config import Config, load_config, source_names
from pact_fast.config.changes import check_resumed, fixed_changes
from pact_fast.errors import PactError

# Files and folders that a start makes before its first checkpoint
MADE = (
    "tokenizer",
    "base",
    "rollouts",
    "tensorboard",
    "wandb",
    "tracking_id",
    "max_tokens_per_pack",
    "metrics.jsonl",
    "summary.json",
    "report.html",
)


def open_run(config: Config, resumed: bool) -> None:
    """Create the run directory, or reopen it.

    What an earlier start left there without a checkpoint is no part of this run, unless that start got as far as
    metrics.jsonl with the same settings: it is removed, and made again. config.yaml is written at once in a new
    directory, and by `save_config` in a run that exists, so that a start that fails does not change it.

    Args:
        config: The run's configuration.
        resumed: There is a checkpoint to continue from.

    Raises:
        PactError: It holds a run and resume=never; the resumed run had other settings; a setting points to a file that
            would be removed; or the directory is not writable.
    """
    run = Path(config.output_dir)
    if holds_run(run) and config.resume == "never":
        raise PactError(f"{run} already holds a run; continue it with resume=auto, or choose another output_dir=")
    if resumed or any((run / "checkpoints").glob("step_*")):  # a damaged checkpoint is not a reason to remove the run
        check_resumed(config, run / "config.yaml")
    elif not _same_start(config, run):
        _remove_leftovers(config, run)
    with io_errors(run):
        (run / "rollouts").mkdir(parents=True, exist_ok=True)
    if not resumed:
        save_config(config)


def holds_run(run: Path) -> bool:
    """Whether training has begun in a directory: it has metrics or a checkpoint."""
    return (run / "metrics.jsonl").exists() or any((run / "checkpoints").glob("step_*"))


def save_config(config: Config) -> None:
    """Write config.yaml. PactError if the write fails."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
    write_text(Path(config.output_dir) / "config.yaml", text)


def _same_start(config: Config, run: Path) -> bool:
    """Whether a run without a checkpoint has begun with these settings, so that its base model can be used."""
    try:
        return (run / "metrics.jsonl").exists() and not fixed_changes(load_config(str(run / "config.yaml")), config)
    except PactError:  # missing, damaged, or of another version
        return False


def _is_ours(path: Path) -> bool:
    """Whether a file is a config.yaml with all sections, as a run writes it."""
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(saved, dict) and {"output_dir", "model", "data", "env", "rollout", "algorithm"} <= saved.keys()


def _remove_leftovers(config: Config, run: Path) -> None:
    """Remove what a start without a checkpoint left behind."""
    leftovers = [run / name for name in MADE if (run / name).exists()]
    if leftovers and not _is_ours(run / "config.yaml"):
        raise PactError(f"{leftovers[0]} was not made by a run (no config.yaml of one); choose another output_dir=")
    model, data = config.model, config.data
    sources = [name for value in (data.train, data.eval, data.expert) for name in source_names(value)]
    for used in filter(None, (model.path, model.tokenizer, model.chat_template, *sources)):
        for leftover in leftovers:
            if Path(used).resolve().is_relative_to(leftover.resolve()):
                raise PactError(f"{used} lies in {leftover}, which a new run replaces; choose another output_dir=")
    with io_errors(run):
        for leftover in leftovers:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


@contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) to `path` into a PactError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PactError(
            f"cannot write {path}: {reason}; free some space or make the folder writable, and continue with resume=auto"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file atomically (temporary file, fsync, rename). PactError if the write fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    with io_errors(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def atomic_save_pretrained(objects: Any, folder: Path) -> None:
    """`save_pretrained` of one object or a list (model, tokenizer) into a folder that appears when it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    with io_errors(folder):
        for item in objects if isinstance(objects, list) else [objects]:
            item.save_pretrained(temporary)
        temporary.rename(folder)


def folder_content(folder: Path) -> dict[str, bytes]:
    """Content of the files of a small folder, and of its folders, by path in it; empty if there is no folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def versions() -> dict[str, str]:
    """Installed versions of Python and the main packages, for summary.json."""
    result = {"python": platform.python_version()}
    for name in ("pact-fast", "torch", "transformers", "tokenizers", "numpy"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "not installed"
    return result
