"""The run directory, and writes to it that are complete or absent.

config.yaml, summary.json, metrics.jsonl, tensorboard/, tokenizer/, base/, rollouts/, checkpoints/, report.html
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from pact_fast.config import Config
from pact_fast.errors import PactError


def open_run(config: Config) -> Path:
    """Create or reopen the run directory and write config.yaml.

    Raises:
        PactError: It holds another run and resume=never, or it is not writable.
    """
    run = Path(config.output_dir)
    if (run / "metrics.jsonl").exists() and config.resume == "never":
        raise PactError(f"{run} already holds a run; continue it with resume=auto, or choose another output_dir=")
    with io_errors(run):
        (run / "rollouts").mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
    return run


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


def versions() -> dict[str, str]:
    """Installed versions of Python and the main packages, for summary.json."""
    result = {"python": platform.python_version()}
    for name in ("pact-fast", "torch", "transformers", "tokenizers", "numpy"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "not installed"
    return result
