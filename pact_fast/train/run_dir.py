"""The run directory: its files, and whether a start may write there.

config.yaml, summary.json, metrics.jsonl, latest, tracking_id, tensorboard/, wandb/, tokenizer/, base/, rollouts/,
checkpoints/, report.html
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from pact_fast.config import Config, load_config, source_names
from pact_fast.config.changes import check_resumed, fixed_changes
from pact_fast.config.settings_file import load_yaml
from pact_fast.errors import PactError
from pact_fast.files import io_errors, remove, write_text
from pact_fast.train import checkpoint

# Files and folders that a run writes into its directory. All others belong to the user.
FOLDERS = ("tokenizer", "base", "rollouts", "tensorboard", "wandb", "checkpoints", "engine")
FILES = (
    *("config.yaml", "metrics.jsonl", "summary.json", "report.html", "view.html", "latest", "max_tokens_per_pack"),
    *("skipped_rows.jsonl", "tracking_id"),
)
LATEST = "latest"  # the name of the newest checkpoint that was ever saved: tells a lost one from one that never was
KEPT = ("config.yaml", "checkpoints")  # by `_remove_leftovers`
HEADER = "# The resolved settings of this run, written by pact-fast at every start. Copy the file before you edit it.\n"


def open_run(config: Config, resumed: bool) -> str | None:
    """Create the run directory, or reopen it. The caller holds its lock.

    What an earlier start left there without a checkpoint is no part of this run, unless that start got as far as
    metrics.jsonl with the same settings: it is removed, and made again. config.yaml is written at once in a new
    directory, and by `save_config` in a run that exists, so that a start that fails does not change it.

    Args:
        config: The run's configuration.
        resumed: There is a checkpoint to continue from.

    Returns:
        A line for people, if steps of an earlier start are repeated from the beginning; else None.

    Raises:
        PactError: It holds a run and resume=never; the resumed run had other settings; its checkpoints are lost or
            damaged; something there was not made by a run, or is a link; a setting points to a file that would be
            removed; or the directory is not writable.
    """
    run = Path(config.output_dir)
    _check_kinds(run)
    if holds_run(run) and config.resume == "never":
        raise PactError(f"{run} already holds a run; continue it with resume=auto, or choose another output_dir=")
    repeated = None
    if resumed or checkpoint.checkpoint_folders(run / "checkpoints"):
        check_resumed(config, run / "config.yaml")
    if not resumed:
        _check_no_checkpoint_is_lost(run)
        trained = _has_trained(run / "metrics.jsonl")
        if trained:
            check_resumed(config, run / "config.yaml")
            repeated = f"{run} has no checkpoint yet, so its first steps are repeated"
        elif not _same_start(config, run):
            _remove_leftovers(config, run)
        if (run / "config.yaml").exists() and not _is_ours(run / "config.yaml"):
            raise PactError(
                f"{run / 'config.yaml'} was not written by a run, and would be replaced; choose another output_dir="
            )
    with io_errors(run):
        for leftover in _unfinished(run):  # no other process writes while we hold the lock
            remove(leftover)
        (run / "rollouts").mkdir(parents=True, exist_ok=True)
    if not resumed:
        save_config(config)
    return repeated


def _unfinished(run: Path) -> Iterator[Path]:
    """Temporary files that a killed process has left."""
    for name in (*FILES, *FOLDERS):
        yield from run.glob(f".{name}.????????.tmp")
    yield from (run / "rollouts").glob(".*.????????.tmp")


def holds_run(run: Path) -> bool:
    """Whether training has begun in a directory: it has metrics, a checkpoint, or traces of one."""
    names = ("metrics.jsonl", "summary.json", LATEST)
    return any((run / name).exists() for name in names) or bool(checkpoint.checkpoint_folders(run / "checkpoints"))


def save_config(config: Config) -> None:
    """Write config.yaml. PactError if the write fails."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
    write_text(Path(config.output_dir) / "config.yaml", HEADER + text)


def _check_kinds(run: Path) -> None:
    """PactError if something stands where a run writes, and is not a plain file or folder: a link leads to other files."""
    for name in (*FOLDERS, *FILES):
        path = run / name
        wanted, is_wanted = ("folder", path.is_dir()) if name in FOLDERS else ("file", path.is_file())
        if path.is_symlink():
            raise PactError(
                f"{path} is a symbolic link, and a run writes into its own directory only; remove it (output_dir= itself "
                "may lead to another disk)"
            )
        if path.exists() and not is_wanted:
            raise PactError(f"{path} is not a {wanted}; remove it, or choose another output_dir=")


def _check_no_checkpoint_is_lost(run: Path) -> None:
    """PactError if there was a checkpoint, and none can be used: a new start would write over the run."""
    found = checkpoint.checkpoint_folders(run / "checkpoints")
    if found:
        reason = f"{found[-1].name}: {checkpoint.problem(found[-1])}"
    elif (run / LATEST).exists() or (run / "summary.json").exists():
        reason = f"{run / 'checkpoints'} has none any more"
    else:
        return
    raise PactError(
        f"{run} holds a run, but no checkpoint that can be used ({reason}); restore its checkpoints from a copy, or delete "
        f"{run} to start again"
    )


def _has_trained(metrics: Path) -> bool:
    """Whether metrics.jsonl has records of training steps, or something that cannot be read."""
    if not metrics.exists():
        return False
    for line in metrics.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] > 0:
                return True
        except (ValueError, KeyError, TypeError, RecursionError):
            return True
    return False


def _same_start(config: Config, run: Path) -> bool:
    """Whether a run without a checkpoint has begun with these settings, so that its base model can be used."""
    try:
        return (run / "metrics.jsonl").exists() and not fixed_changes(load_config(str(run / "config.yaml")), config)
    except PactError:  # missing, damaged, or of another version
        return False


def _is_ours(path: Path) -> bool:
    """Whether a file is a config.yaml as a run writes it: our first line, and all sections."""
    try:
        text = path.read_text(encoding="utf-8")
        saved = load_yaml(text) if text.startswith(HEADER) else None
    except (OSError, UnicodeDecodeError, PactError):
        return False
    return isinstance(saved, dict) and {"output_dir", "model", "data", "env", "rollout", "algorithm"} <= saved.keys()


def _remove_leftovers(config: Config, run: Path) -> None:
    """Remove the leftovers of a start without a checkpoint."""
    leftovers = [run / name for name in (*FOLDERS, *FILES) if name not in KEPT and (run / name).exists()]
    if leftovers and not _is_ours(run / "config.yaml"):
        raise PactError(f"{leftovers[0]} was not made by a run (no config.yaml beside it); choose another output_dir=")
    model, data = config.model, config.data
    sources = [name for value in (data.train, data.eval, data.expert) for name in source_names(value)]
    for used in filter(None, (model.path, model.tokenizer, model.chat_template, *sources)):
        for leftover in leftovers:
            if Path(used).resolve().is_relative_to(leftover.resolve()):
                raise PactError(f"{used} is inside {leftover}, which a new run replaces; choose another output_dir=")
    with io_errors(run):
        for leftover in leftovers:
            remove(leftover)


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
