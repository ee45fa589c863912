"""Reads and writes task files: JSONL, JSON arrays and parquet, in the columns of docs/data.md."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pact_fast.data.row_formats import ROW_FORMATS, detect_row_format
from pact_fast.data.rows import (
    OWN_FIELDS,
    TRACE_FIELDS,
    Row,
    check_calls,
    check_environment,
    nearest,
    one_line,
    quoted,
    read_id,
    read_json,
    read_trace,
    task_from_row,
    type_name,
)
from pact_fast.data.schemas import drop_nulls
from pact_fast.data.types import ExpertTrace, Task, ToolSchema
from pact_fast.errors import PASSED_ON, DataError, PactError
from pact_fast.limits import memory_limit

__all__ = ["attach_traces", "read_tasks", "read_traces", "tool_schema", "write_tasks"]

NumberedRow = tuple[int, "Row | DataError"]  # line or row number from 1
PARQUET_BATCH = 256  # rows held both as Arrow and as Python objects
BATCH_BYTES = 2**30  # of a batch
MAX_RATIO = 1000  # of the rows' size to the file's; repeated tool schemas reach 200
COMPRESSED = {  # first bytes of a file -> compression
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}


def read_tasks(
    path: str | Path,
    format: str = "auto",
    max_rows: int | None = None,
    environments: Collection[str] | None = None,
    on_bad_row: Callable[[DataError], None] | None = None,
) -> list[Task]:
    """The tasks of a file, in file order.

    A task without an `id` gets f"{file stem}-{row}", FTRL f"ftrl-{row}", ToolHop f"toolhop-{row}", with rows counted
    from 0.

    Args:
        path: A JSONL, JSON or parquet file.
        format: `pact` (also TRL and verifiers), `verl`, `ftrl`, `toolhop`, or `auto`: detected from the first row.
        max_rows: Read only this many rows; None: all.
        environments: Names that the column `env` may hold; None: any.
        on_bad_row: Called with the error of a row that cannot be used, which is then left out; None: raise it.

    Raises:
        DataError: A row cannot be used, or (with `on_bad_row`) no row can. Names the file, the line (JSONL) or row
            (others), from 1, and the field.
        PactError: The format is unknown.
    """
    path = Path(path)
    if format != "auto" and format not in ROW_FORMATS:
        raise PactError(f"unknown data format {quoted(format)}{nearest(format, [*ROW_FORMATS, 'auto'])}")
    chosen = ROW_FORMATS.get(format)
    tasks: list[Task] = []
    lines: dict[str, int] = {}
    errors: list[DataError] = []
    for number, (line, row) in enumerate(itertools.islice(_rows(path), max_rows)):
        try:
            with _add_location(path, line):
                if isinstance(row, DataError):
                    raise row
                chosen = chosen or detect_row_format(row)
                task = task_from_row(chosen.convert(row), f"{chosen.id_prefix or path.stem}-{number}")
                if environments is not None:
                    check_environment(task.env, environments)
                if task.id in lines:
                    problem = f"{quoted(task.id)} is also the id of row {lines[task.id]}; ids are unique"
                    raise DataError(problem, field="id")
        except DataError as error:
            if on_bad_row is None:
                raise
            errors.append(error)
            on_bad_row(error)
            continue
        lines[task.id] = line
        task.source = str(path), line
        tasks.append(task)
    if not tasks:
        raise DataError(f"none of its {len(errors):,} rows can be used; the first: {errors[0]}", file=str(path))
    return tasks


def read_traces(path: str | Path) -> dict[str, ExpertTrace]:
    """Expert traces by task id, from rows of {id, expert_trace}. `trace` and `demo` are read as `expert_trace`, too.

    Raises DataError as `read_tasks` does.
    """
    path = Path(path)
    traces: dict[str, ExpertTrace] = {}
    for line, row in _rows(path):
        with _add_location(path, line):
            if isinstance(row, DataError):
                raise row
            task_id = read_id(row.get("id"))
            if task_id in traces:
                raise DataError(f"{quoted(task_id)} has a trace already; keep one per task", field="id")
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
            raise DataError(f"no task has the id {quoted(task_id)} of an expert trace{nearest(task_id, list(by_id))}")
        with _add_location(f"expert trace of task {quoted(task_id)}"):
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
        raise PactError(f"task {quoted(task.id)}: a further column may not be named '{taken[0]}'; rename it")
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
            f"task {quoted(task.id)}: not JSON data ({one_line(error)}); convert or drop the value"
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
            f"tool '{name}': {one_line(error)}; give type hints and a docstring with an Args section"
        ) from None
    schema["function"].pop("return", None)  # not in OpenAI's schema; templates would show it to the model
    return schema


@contextmanager
def _add_location(place: str | Path, line: int | None = None) -> Iterator[None]:
    """Adds the file (or other place) and the line to a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(error.problem, file=str(place), line=line, field=error.field) from None


def _rows(path: Path) -> Iterator[NumberedRow]:
    """(line or row number from 1, the row or the reason why it cannot be read).

    The first bytes of the file decide its type, not its name.
    """
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".jsonl", ".json", ".parquet"))
        raise DataError(f"is a folder; name a file in it{', such as ' + inside[0] if inside else ''}", file=str(path))
    if not path.exists():
        raise DataError(
            "no such file; check the path (data.train, data.eval and data.expert name files)", file=str(path)
        )
    try:
        with path.open("rb") as file:
            yield from _not_empty(path, _rows_of(path, file))
    except OSError as error:
        raise DataError(f"cannot read: {one_line(error)}", file=str(path)) from None


def _not_empty(path: Path, rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
    first = next(rows, None)
    if first is None:
        raise DataError("holds no rows; give a file with at least one", file=str(path))
    yield first
    yield from rows


def _rows_of(path: Path, file: BinaryIO) -> Iterator[NumberedRow]:
    head = file.read(64)
    file.seek(0)
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"is {name}-compressed; decompress it first", file=str(path))
    if head.startswith(b"PAR1"):
        return _parquet_rows(path, file)
    if path.suffix == ".parquet":
        raise DataError("is not a parquet file; check that it was copied whole", file=str(path))
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _array_rows(path, file)
    return _line_rows(path, file)


def _line_rows(path: Path, file: BinaryIO) -> Iterator[NumberedRow]:
    for line, raw in enumerate(file, 1):
        try:
            text = _decode(raw).strip()
            row = _object(read_json(text, ""), "a line") if text else None
        except DataError as error:
            yield line, error
        else:
            if row is not None:
                yield line, row


def _array_rows(path: Path, file: BinaryIO) -> Iterator[NumberedRow]:
    with _add_location(path):
        rows = read_json(_decode(file.read()), "")
    for number, entry in enumerate(rows, 1):
        try:
            row: Row | DataError = _object(entry, "an entry of the array")
        except DataError as error:
            row = error
        yield number, row


def _object(value: Any, what: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{what} must be one JSON object, {{…}}, found {type_name(value)}")
    return value


def _decode(raw: bytes) -> str:
    if b"\0" in raw:
        raise DataError("has NUL bytes; the file is damaged or UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[NumberedRow]:
    import pyarrow.parquet as pq

    number = 0
    try:
        parquet = pq.ParquetFile(file)
        names = [name for name in parquet.schema_arrow.names if not name.startswith("__index_level_")]
        for batch in _batches(parquet, path):
            for row in range(batch.num_rows):
                number += 1
                try:
                    values: Row | DataError = {name: _value(batch.column(name)[row], name) for name in names}
                except DataError as error:
                    values = error
                yield number, values
    except PASSED_ON:
        raise
    except BaseException as error:  # damaged metadata: whatever the reader happens to run into
        raise DataError(f"is not a readable parquet file ({one_line(error)}); write it again", file=str(path)) from None


def _batches(parquet: Any, path: Path) -> Iterator[Any]:
    """Batches of rows. DataError for a file that was made to become far larger than it is."""
    compressed, decoded = path.stat().st_size, 0
    batches = parquet.iter_batches(PARQUET_BATCH)
    try:
        while True:
            with memory_limit(BATCH_BYTES, f"reading {PARQUET_BATCH} of its rows"):
                batch = next(batches, None)
            if batch is None:
                return
            decoded += sum(_decoded_bytes(column) for column in batch.columns)
            if decoded > BATCH_BYTES and decoded > MAX_RATIO * compressed:
                raise PactError(f"its rows are more than {MAX_RATIO:,} times as large as the file")
            yield batch
    except DataError:
        raise
    except PactError as error:
        raise DataError(
            f"{error}, as in a file that was made to fill the memory; write it again", file=str(path)
        ) from None


def _decoded_bytes(column: Any) -> int:
    """Size of a column whose repeated values are written out, as Python objects will have them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return column.nbytes
    try:
        lengths = pc.binary_length(column.dictionary)
    except pa.ArrowException:  # of no texts
        return column.nbytes
    return pc.sum(lengths.take(column.indices)).as_py() or 0


def _value(scalar: Any, name: str) -> Any:
    """The Python value of an Arrow scalar. Bad UTF-8 and out-of-range times raise ValueError."""
    try:
        # rows.py cleans our own columns: an argument that is required and nullable keeps its null
        return scalar.as_py() if name in OWN_FIELDS else drop_nulls(scalar.as_py())
    except (ValueError, OverflowError) as error:
        raise DataError(f"cannot be read: {one_line(error)}; write the column again", field=name) from None
