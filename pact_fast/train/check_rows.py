"""Checks every row of the data before the first step, so that a bad row does not end a run after hours."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pact_fast.algorithms.base import Algorithm
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.row_check import RowCheck, RowLimits, with_place
from pact_fast.chat.template_check import check_user_turns
from pact_fast.components import LossContext
from pact_fast.config import Config
from pact_fast.data.sources import FileTasks, TaskSource
from pact_fast.data.types import Task
from pact_fast.envs.base import has_user
from pact_fast.envs.registry import environment, environment_name, is_built_in
from pact_fast.errors import DataError, PactError
from pact_fast.files import io_errors, write_text
from pact_fast.model.build import architecture
from pact_fast.train.unique_ids import UniqueIds

SKIPPED_ROWS = "skipped_rows.jsonl"  # in the run directory


@dataclass(frozen=True)
class CheckedRows:
    """Result of the check.

    rows    rows that were checked
    errors  {position in the order of the task source: error} of rows to be skipped
    traces  rows with an expert trace
    prompt  tokens of the longest prompt (in bytes)
    trace   tokens of the longest prompt with its trace (in bytes); 0: no trace is trained on
    """

    rows: int
    errors: Mapping[int, DataError]
    traces: int
    prompt: int
    trace: int


class TaskCheck:
    """The check of a task before it is trained on: `check(task)` raises a DataError that names file, line, field and cure.

    Args:
        config: Limits, algorithm and environment.
        renderer: Renders prompts and traces.
        algorithm: States whether traces are trained on, and rollouts sampled.
    """

    def __init__(self, config: Config, renderer: ChatRenderer, algorithm: Algorithm):
        self._limits = row_limits(config, algorithm)
        self.rows = RowCheck(renderer, self._limits)
        self._default = environment_name(config.env, config.data)
        self._class_of = functools.cache(environment.get)
        self._user_is_model = config.rollout.user != "environment"
        # an error of the template, not of a row
        self._check_dialogue = functools.cache(functools.partial(check_user_turns, renderer))

    def __call__(self, task: Task) -> None:
        env = self._class_of(task.env or self._default)
        check_environment(task, env)
        self.rows.check(task)
        if has_user(env) or self._user_is_model:
            self._check_dialogue()
        if self._limits.trace and has_user_turns(task):
            self._check_dialogue(after_results=speaks_after_results(task))


def check_rows(
    tasks: TaskSource,
    config: Config,
    renderer: ChatRenderer,
    algorithm: Algorithm,
    advance: Callable[[], object] = lambda: None,
    *,
    complete: bool = False,
) -> CheckedRows:
    """Render, check and measure the tasks of the files that `rows_to_check` counts; of generated tasks, the first step's.

    Args:
        tasks: The run's tasks.
        config: Limits, algorithm, environment, and data.on_bad_row.
        renderer: Renders prompts and traces.
        algorithm: States whether traces are trained on, and rollouts sampled.
        advance: Called after each row.
        complete: Check every row, also where there are too many to do so before the first step.

    Raises:
        DataError: A row cannot be trained on, unless data.on_bad_row=skip.
    """
    check = TaskCheck(config, renderer, algorithm)
    errors: dict[int, DataError] = {}
    chosen: FileTasks | list[Task] = (
        tasks if isinstance(tasks, FileTasks) else tasks.train(0, config.trainer.prompts_per_step)
    )
    positions = _positions(chosen, complete)
    # ids of rows that are held were compared when they were read
    ids = UniqueIds(chosen) if complete and isinstance(chosen, FileTasks) and chosen.reads_when_drawn else None
    for position in positions:
        try:
            task = chosen[position]
            check(task)
            if ids:
                ids.see(position, task)
        except DataError as error:
            if config.data.on_bad_row == "error" or not isinstance(tasks, FileTasks):
                raise
            errors[position] = error
        advance()
    if ids:
        ids.check()
    rows = check.rows
    prompt = rows.tokens(rows.longest[1])[0] if rows.longest else 0
    trace = sum(rows.tokens(rows.longest_trace[1])) if rows.longest_trace else 0
    return CheckedRows(len(positions), errors, rows.traces, prompt, trace)


def has_user_turns(task: Task) -> bool:
    """Whether a user speaks in the task's expert trace, which reasons."""
    turns = task.expert.turns if task.expert else ()
    return any(turn.user is not None for turn in turns) and any(turn.reasoning for turn in turns)


def speaks_after_results(task: Task) -> bool:
    """Whether a user speaks right behind results of calls in the task's expert trace, before the expert answers."""
    return any(turn.calls and turn.user is not None for turn in (task.expert.turns if task.expert else ()))


def check_environment(task: Task, env: type) -> None:
    """DataError if the task lacks something that its environment needs, as far as its class can say."""
    check_task = getattr(env, "check_task", None)
    if check_task is None:
        return
    try:
        check_task(task if is_built_in(env) else copy.deepcopy(task))
    except PactError as error:
        raise with_place(task, error) from None


def rows_to_check(tasks: TaskSource, config: Config, complete: bool = False) -> int:
    """Return the number of rows that `check_rows` checks."""
    return len(_positions(tasks, complete)) if isinstance(tasks, FileTasks) else config.trainer.prompts_per_step


def _positions(tasks: FileTasks | list[Task], complete: bool) -> Sequence[int]:
    return tasks.sample() if isinstance(tasks, FileTasks) and not complete else range(len(tasks))


def row_limits(config: Config, algorithm: Algorithm) -> RowLimits:
    """The limits of a run's rows."""
    contexts = {context for route in algorithm.routes(with_trace=True) for context in route.contexts}
    traced = bool(contexts & {LossContext.TRACE, LossContext.EXPERT})
    rendering = config.algorithm.trace.rendering if LossContext.TRACE in contexts else "turns"
    rollout = config.rollout
    window = getattr(architecture(config.model).get_text_config(), "max_position_embeddings", None)
    if window and rollout.max_prompt_length + rollout.max_completion_length > window:
        window = None  # no row is to blame: `build.check_context` refuses the settings
    return RowLimits(
        prompt=rollout.max_prompt_length,
        window=window,
        completion=rollout.max_completion_length if algorithm.needs_rollouts else 0,
        trace=rendering if traced else None,
        required=algorithm.needs_traces or not algorithm.samples(0),
    )


def write_skipped(errors: list[DataError], run: Path) -> str | None:
    """List skipped rows in the run directory. Returns a line for people; None, and no file, if none was skipped."""
    path = run / SKIPPED_ROWS
    if not errors:
        with io_errors(path):
            path.unlink(missing_ok=True)
        return None
    write_text(path, "".join(line + "\n" for line in map(_skipped_line, errors)))
    return f"skipped {len(errors):,} rows that cannot be used (data.on_bad_row=skip); they are listed in {path}"


def _skipped_line(error: DataError) -> str:
    found = {"file": error.file, "line": error.line, "field": error.field, "problem": error.problem}
    return json.dumps(found, ensure_ascii=False)


class SkippedRows:
    """The list of rows that are skipped when they are drawn; it grows during a run, and stays when the run is resumed.

    Args:
        run: The run directory.
        errors: Of the skipped rows; grows.
    """

    def __init__(self, run: Path, errors: Sequence[DataError]):
        self._path, self._errors, self._written = run / SKIPPED_ROWS, errors, 0
        with io_errors(self._path):
            known = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self._lines = dict.fromkeys(known)

    def write(self) -> str | None:
        """List the rows found since the last call. Returns a line for display; None if there is nothing new."""
        found = self._errors[self._written :]
        self._written += len(found)
        before = len(self._lines)
        self._lines |= dict.fromkeys(map(_skipped_line, found))
        if len(self._lines) == before:
            return None
        write_text(self._path, "".join(f"{line}\n" for line in self._lines))
        return f"skipped {len(self._lines):,} rows so far that cannot be used; they are listed in {self._path}"
