"""Inputs of a run, read before the model is built: data files, tokenizer, rows, checkpoint. Equal on all ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pact_fast.algorithms.base import Algorithm
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config, DataConfig, load_config
from pact_fast.data.row_sources import resolve_data
from pact_fast.data.sources import FileTasks, TaskSource
from pact_fast.data.types import Task
from pact_fast.distributed.world import World
from pact_fast.envs.base import Environment
from pact_fast.errors import DataError
from pact_fast.files import atomic_save_pretrained, io_errors
from pact_fast.model.tokenizer import make_tokenizer
from pact_fast.train import checkpoint
from pact_fast.train.check_rows import SkippedRows, TaskCheck, check_rows, rows_to_check, write_skipped
from pact_fast.train.preflight import check_success
from pact_fast.train.progress import Progress
from pact_fast.train.run_dir import folder_content
from pact_fast.train.user_model import USER_FOLDER, tokenizer_tasks


def resolve_run_data(config: Config, run: Path, world: World) -> Config:
    """The settings with the files and commits that the names of data stand for now; a resumed run keeps its own."""
    found: list[dict[str, Any]] = []

    def find() -> None:
        saved = run / "config.yaml"
        resumed = config.resume == "auto" and saved.exists() and checkpoint.checkpoint_folders(run / "checkpoints")
        recorded = load_config(str(saved)).data if resumed else None
        found.append(resolve_data(config.data, recorded).model_dump())

    world.run_on_main(find, "the data's files and revisions")
    (data,) = world.broadcast_from_main(lambda: found, "the data's files and revisions")
    return config.model_copy(update={"data": DataConfig.model_validate(data)})


def newest_checkpoint(config: Config, run: Path, world: World) -> Path | None:
    """The checkpoint to resume from, chosen by rank 0; None: the run starts at step 0."""
    if config.resume != "auto":
        return None

    def newest() -> str | None:
        path = checkpoint.latest(run / "checkpoints")
        return str(path) if path else None

    path = world.broadcast_from_main(newest, "the newest checkpoint")
    return Path(path) if path else None


def save_tokenizer(
    config: Config, run: Path, tasks: TaskSource, make_env: Callable[[Task], Environment], *, resumed: bool
) -> None:
    """Save the tokenizer to the run directory; in a resumed run, the one that is there stays.

    In a new one, a tokenizer of an earlier start is replaced: the settings are the same, but the files that they name may
    have changed. Models that were trained with another tokenizer are then removed. For rank 0.

    Args:
        config: The run's configuration.
        run: The run directory.
        tasks: Tasks that a new tokenizer is trained on.
        make_env: Makes the environment of a task, for the user's side of the tasks.
        resumed: Whether the run continues from a checkpoint.
    """
    saved, trained = run / "tokenizer", [run / "base", run / USER_FOLDER]
    if resumed and saved.exists():
        return
    before = folder_content(saved)
    with io_errors(saved):
        shutil.rmtree(saved, ignore_errors=True)
    atomic_save_pretrained(make_tokenizer(config.model, tokenizer_tasks(config, tasks, make_env)), saved)
    for model in trained:
        if model.exists() and folder_content(saved) != before:
            with io_errors(model):
                shutil.rmtree(model)


def skip_bad_rows(
    config: Config,
    run: Path,
    tasks: TaskSource,
    renderer: ChatRenderer,
    algorithm: Algorithm,
    world: World,
    progress: Progress,
) -> SkippedRows | None:
    """Check rows on rank 0, and leave out the same ones on every rank.

    Of files that are read when rows are drawn, some rows are checked here, and every rank checks the others when it draws them.

    Args:
        config: The run's configuration.
        run: The run directory, which gets a list of the skipped rows.
        tasks: The run's tasks; rows of its files are marked as skipped.
        renderer: Renders prompts and traces.
        algorithm: States whether traces are trained on, and rollouts sampled.
        world: The ranks.
        progress: Shows the check.

    Returns:
        On rank 0, the list of rows that are skipped later, where rows are checked when they are drawn.

    Raises:
        DataError: A row cannot be trained on, unless data.on_bad_row=skip.
    """
    found: dict[int, tuple[str, str, int | None, str]] = {}

    def check() -> None:
        with progress.phase("checking rows", rows_to_check(tasks, config)) as advance:
            errors = check_rows(tasks, config, renderer, algorithm, lambda: advance("")).errors
        found.update({i: (error.problem, error.file, error.line, error.field) for i, error in errors.items()})

    world.run_on_main(check, "the check of the rows")
    found = world.broadcast_from_main(lambda: found, "the skipped rows")
    if isinstance(tasks, FileTasks):
        tasks.skip({i: DataError(p, file=f, line=n, field=c) for i, (p, f, n, c) in found.items()})
        if tasks.reads_when_drawn:
            return _check_drawn(config, run, tasks, renderer, algorithm, world, progress)
        if world.is_main and (note := write_skipped(tasks.skipped, run)):
            progress.note(note)
    return None


def _check_drawn(
    config: Config,
    run: Path,
    tasks: FileTasks,
    renderer: ChatRenderer,
    algorithm: Algorithm,
    world: World,
    progress: Progress,
) -> SkippedRows | None:
    """Let every rank check the rows that have not been checked when they are drawn."""
    tasks.check_drawn(TaskCheck(config, renderer, algorithm), partial(check_success, config, algorithm))
    progress.note(
        f"{rows_to_check(tasks, config):,} of {len(tasks):,} rows are checked, the others when they are drawn "
        "(`pact-fast doctor` checks all)"
    )
    return SkippedRows(run, tasks.skipped) if world.is_main else None
