"""Checks every row of the data before the first step, so that a bad row does not end a run after hours."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable, Mapping
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


def check_rows(
    tasks: TaskSource,
    config: Config,
    renderer: ChatRenderer,
    algorithm: Algorithm,
    advance: Callable[[], object] = lambda: None,
) -> CheckedRows:
    """Render, check and measure every task of the files; of generated tasks, those of the first step.

    Args:
        tasks: The run's tasks.
        config: Limits, algorithm, environment, and data.on_bad_row.
        renderer: Renders prompts and traces.
        algorithm: States whether traces are trained on, and rollouts sampled.
        advance: Called after each row.

    Raises:
        DataError: A row cannot be trained on, unless data.on_bad_row=skip.
    """
    limits = row_limits(config, algorithm)
    check = RowCheck(renderer, limits)
    default = environment_name(config.env, config.data)
    class_of = functools.cache(environment.get)
    from_files = isinstance(tasks, FileTasks)
    errors: dict[int, DataError] = {}
    check_dialogue = functools.cache(
        functools.partial(check_user_turns, renderer)
    )  # an error of the template, not of a row
    rows = 0
    chosen: Iterable[Task] = tasks if isinstance(tasks, FileTasks) else tasks.train(0, config.trainer.prompts_per_step)
    for position, task in enumerate(chosen):
        rows += 1
        try:
            env = class_of(task.env or default)
            check_environment(task, env)
            check.check(task)
            if has_user(env) or config.rollout.user == "policy":
                check_dialogue()
            if limits.trace and has_user_turns(task):
                check_dialogue(after_results=speaks_after_results(task))
        except DataError as error:
            if config.data.on_bad_row == "error" or not from_files:
                raise
            errors[position] = error
        advance()
    prompt = check.tokens(check.longest[1])[0] if check.longest else 0
    trace = sum(check.tokens(check.longest_trace[1])) if check.longest_trace else 0
    return CheckedRows(rows, errors, check.traces, prompt, trace)


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


def rows_to_check(tasks: TaskSource, config: Config) -> int:
    """How many rows `check_rows` checks."""
    return len(tasks) if isinstance(tasks, FileTasks) else config.trainer.prompts_per_step


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
    lines = [
        {"file": error.file, "line": error.line, "field": error.field, "problem": error.problem} for error in errors
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return f"skipped {len(errors):,} rows that cannot be used (data.on_bad_row=skip); they are listed in {path}"
