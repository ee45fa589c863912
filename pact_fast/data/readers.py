"""Reads tasks from files and datasets, and writes task files, in the columns of docs/data.md."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pact_fast.data.row_files import add_location
from pact_fast.data.row_formats import ROW_FORMATS, RowFormat, detect_row_format
from pact_fast.data.row_sources import Source, row_sources
from pact_fast.data.rows import (
    OWN_FIELDS,
    TRACE_FIELDS,
    check_calls,
    check_environment,
    nearest,
    read_id,
    read_trace,
    task_from_row,
)
from pact_fast.data.types import ExpertTrace, Task, ToolSchema
from pact_fast.errors import DataError, PactError, error_line
from pact_fast.text import short

__all__ = ["attach_traces", "read_tasks", "read_traces", "tool_schema", "write_tasks"]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Rows are read into objects that all stay: looking for garbage among them takes more than half of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_garbage_collection()
def read_tasks(
    sources: Source | Sequence[Source],
    format: str = "auto",
    max_rows: int | None = None,
    environments: Collection[str] | None = None,
    on_bad_row: Callable[[DataError], None] | None = None,
) -> list[Task]:
    """The tasks of files and datasets, in their order.

    A task without an `id` gets f"{stem}-{row}", with rows counted from 0 in each source; the stem is that of the file,
    `ftrl` or `toolhop` for rows of that format, and `{name}-{split}` for a dataset of the Hub. The second source with the
    same stem gets f"{stem}.2", and so on.

    Args:
        sources: A JSONL, JSON or parquet file, a pattern of files, a dataset of the Hub (`hf://org/name:split`), or several.
        format: `pact` (also TRL and verifiers), `verl`, `ftrl`, `toolhop`, or `auto`: detected from each first row.
        max_rows: Read only this many rows of each source; None: all.
        environments: Names that the column `env` may hold; None: any.
        on_bad_row: Called with the error of a row that cannot be used, which is then left out; None: raise it.

    Raises:
        DataError: A row cannot be used, or (with `on_bad_row`) no row can. Names the source, the line (JSONL) or row
            (others), from 1, and the field.
        PactError: The format is unknown, or a package is missing.
    """
    given = row_format(format)
    tasks: list[Task] = []
    places: dict[str, tuple[str, int]] = {}  # id → source and line
    errors: list[DataError] = []
    stems: Counter[str] = Counter()
    chosen_sources = row_sources(sources, max_rows)
    for source in chosen_sources:
        chosen, stem = given, None
        for number, (line, row) in enumerate(itertools.islice(source.rows(), max_rows)):
            try:
                with add_location(source.name, line):
                    if isinstance(row, DataError):
                        raise row
                    chosen = chosen or detect_row_format(row)
                    stem = stem or unique_stem(chosen.id_prefix or source.stem, stems)
                    task = task_from_row(chosen.convert(row), f"{stem}-{number}")
                    if environments is not None:
                        check_environment(task.env, environments)
                    check_new_id(task.id, places, source.name)
            except DataError as error:
                if on_bad_row is None:
                    raise
                errors.append(error)
                on_bad_row(error)
                continue
            places[task.id] = task.source = source.name, line
            tasks.append(task)
    if not tasks:
        problem = f"none of its {len(errors):,} rows can be used; the first: {errors[0]}"
        raise DataError(problem, file=chosen_sources[0].name)
    return tasks


def row_format(name: str) -> RowFormat | None:
    """The format of that name; None for `auto`. PactError if there is none."""
    if name != "auto" and name not in ROW_FORMATS:
        raise PactError(f"unknown data format {short(name)}{nearest(name, [*ROW_FORMATS, 'auto'])}")
    return ROW_FORMATS.get(name)


def unique_stem(stem: str, taken: Counter[str]) -> str:
    """The stem for the first source that has it, `{stem}.2` for the second."""
    taken[stem] += 1
    return stem if taken[stem] == 1 else f"{stem}.{taken[stem]}"


def check_new_id(task_id: str, places: dict[str, tuple[str, int]], source: str) -> None:
    """DataError if an earlier row has the id."""
    if task_id in places:
        other, line = places[task_id]
        place = f"row {line}" if other == source else f"{other}:{line}"
        raise DataError(f"{short(task_id)} is also the id of {place}; ids are unique", field="id")


@_no_garbage_collection()
def read_traces(sources: Source | Sequence[Source]) -> dict[str, ExpertTrace]:
    """Expert traces by task id, from rows of {id, expert_trace}. `trace` and `demo` are read as `expert_trace`, too.

    `sources` as for `read_tasks`. Raises DataError as `read_tasks` does.
    """
    traces: dict[str, ExpertTrace] = {}
    for source in row_sources(sources):
        for line, row in source.rows():
            with add_location(source.name, line):
                if isinstance(row, DataError):
                    raise row
                task_id = read_id(row.get("id"))
                if task_id in traces:
                    raise DataError(f"{short(task_id)} has a trace already; keep one per task", field="id")
                field = next((name for name in TRACE_FIELDS if row.get(name) is not None), TRACE_FIELDS[0])
                traces[task_id] = read_trace(row.get(field), field)
    return traces


def attach_traces(tasks: list[Task], traces: dict[str, ExpertTrace]) -> int:
    """Sets the expert trace of each task whose id has one, replacing any other. Returns the number of traces.

    A task without reference calls of its own gets those of the trace. Raises DataError, before anything is changed, if
    an id is unknown or a trace calls a tool that its task does not list.
    """
    by_id = {task.id: task for task in tasks}
    for task_id, trace in traces.items():
        if task_id not in by_id:
            raise DataError(f"no task has the id {short(task_id)} of an expert trace{nearest(task_id, list(by_id))}")
        with add_location(f"expert trace of task {short(task_id)}"):
            # a task without tools takes those of its environment
            check_calls(trace.calls, by_id[task_id].tools or None, "expert_trace")
    for task_id, trace in traces.items():
        task = by_id[task_id]
        if task.reference_calls is None or (task.expert and task.reference_calls == task.expert.calls):
            task.reference_calls = trace.calls
        task.expert = trace
    return len(traces)


def write_tasks(path: str | Path, tasks: Iterable[Task]) -> None:
    """Writes JSONL from which `read_tasks` reads equal tasks. `Task.columns` become columns of the row.

    Raises PactError if a task is not JSON data, a column has one of our own names, or the file cannot be written.
    """
    lines = [_line(task) for task in tasks]
    try:
        Path(path).write_bytes(b"".join(lines))
    except OSError as error:
        raise PactError(f"{path}: cannot write: {error.strerror}") from None


def _line(task: Task) -> bytes:
    taken = [name for name in OWN_FIELDS if name in task.columns]
    if taken:
        raise PactError(f"task {short(task.id)}: an extra column may not be named '{taken[0]}'; rename it")
    row = {
        "id": task.id,
        "prompt": task.prompt,
        "tools": task.tools or None,
        "expert_trace": task.expert.to_messages() if task.expert else None,
        "reference_calls": None if task.reference_calls is None else [call.to_json() for call in task.reference_calls],
        "answer": task.answer,
        "env": task.env,
        "env_args": task.env_args or None,
    }
    present = {name: value for name, value in row.items() if value is not None}
    try:
        return json.dumps(present | task.columns, ensure_ascii=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise PactError(
            f"task {short(task.id)}: not JSON data ({error_line(error)}); convert or drop the value"
        ) from None


def tool_schema(function: Callable[..., Any]) -> ToolSchema:
    """The OpenAI schema of a Python function, from its type hints and its Google-style docstring.

    Raises PactError if a type hint or the description of an argument is missing.
    """
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        schema = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as error:
        name = getattr(function, "__name__", repr(function))
        raise PactError(
            f"tool '{name}': {error_line(error)}; give type hints and a docstring with an Args section"
        ) from None
    schema["function"].pop("return", None)  # not in OpenAI's schema; templates would show it to the model
    return schema
