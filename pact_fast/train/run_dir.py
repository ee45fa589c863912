"""The run directory: config.yaml, metrics.jsonl, rollouts/, checkpoints/, base/, summary.json, report.html."""

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
    """Create or reopen the run directory; refuses to mix two runs."""
    run = Path(config.output_dir)
    if (run / "metrics.jsonl").exists() and config.resume == "never":
        raise PactError(f"{run} already holds a run; continue it with resume=auto, or choose another output_dir=")
    with io_errors(run):
        (run / "rollouts").mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
    return run


@contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """A refused write (the disk is full, the folder is not ours) is the user's to mend: PactError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PactError(
            f"cannot write {path}: {reason}; free some space or make the folder writable, and go on with resume=auto"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all. PactError if the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp")
    with io_errors(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def atomic_save_pretrained(what: Any, folder: Path) -> None:
    """`save_pretrained` (of one thing or several) into a folder that appears only when it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    with io_errors(folder):
        for one in what if isinstance(what, list) else [what]:
            one.save_pretrained(temporary)
        temporary.rename(folder)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("pact-fast", "torch", "transformers", "tokenizers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
