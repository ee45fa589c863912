"""The tasks of files that have too many rows to hold: each is read and parsed when it is asked for."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pact_fast.data.line_index import CHUNK, LineRows
from pact_fast.data.parquet_index import ParquetRows
from pact_fast.data.prompt_format import PromptFormat, format_prompt
from pact_fast.data.readers import row_format, unique_stem
from pact_fast.data.row_files import COMPRESSED, NumberedRow, add_location
from pact_fast.data.row_formats import ROW_FORMATS, RowFormat, detect_row_format
from pact_fast.data.row_sources import RowSource, Source, row_sources
from pact_fast.data.rows import check_environment, task_from_row
from pact_fast.data.types import Task
from pact_fast.errors import DataError


class FileRows(Protocol):
    """Rows of a file by number; `suspects` are those to look at first."""

    @property
    def suspects(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def row(self, number: int) -> NumberedRow: ...


class _HeldRows:
    """Rows that have no index: entries of a JSON array, or rows read over the network."""

    suspects: tuple[int, ...] = ()

    def __init__(self, rows: Iterator[NumberedRow]):
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> NumberedRow:
        return self._rows[number]


@dataclass(frozen=True)
class _Part:
    """Rows of one file.

    source  for messages
    stem    of the ids of rows without one
    format  of its rows
    rows    the rows
    first   number of its first row in the source
    lines   rows are counted as lines of the file
    """

    source: str
    stem: str
    format: RowFormat
    rows: FileRows
    first: int
    lines: bool


class IndexedTasks:
    """The tasks of files and datasets by position. Arguments as for `readers.read_tasks`; ids may occur twice.

    Args:
        prompt_format: Format of the prompts.
        skip_bad_rows: A row that is no task does not decide the format of its file; else it is an error.

    Raises:
        DataError: A file has no rows, cannot be read, or its format is unknown.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source],
        format: str,
        max_rows: int | None,
        environments: Collection[str],
        prompt_format: PromptFormat,
        skip_bad_rows: bool,
    ):
        self._environments, self._prompt_format = environments, prompt_format
        self._parts: list[_Part] = []
        stems: Counter[str] = Counter()
        for source in row_sources(sources, max_rows):
            self._parts += _parts(source, row_format(format), max_rows, stems, skip_bad_rows)
        self._starts = [0, *itertools.accumulate(len(part.rows) for part in self._parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> Task:
        """The task at a position. DataError with its place if the row is no task; PactError if its file has changed."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        index = bisect.bisect_right(self._starts, position) - 1
        part, number = self._parts[index], position - self._starts[index]
        line, row = part.rows.row(number)
        if not part.lines:
            line = part.first + number + 1
        with add_location(part.source, line):
            if isinstance(row, DataError):
                raise row
            task = task_from_row(part.format.convert(row), f"{part.stem}-{part.first + number}")
            check_environment(task.env, self._environments)
        task.source = part.source, line
        return format_prompt(task, self._prompt_format)

    def suspects(self) -> list[int]:
        """Positions of rows that do not look as they should, in ascending order; not all of them if there are many."""
        parts = zip(self._starts, self._parts, strict=False)
        return [start + number for start, part in parts for number in part.rows.suspects]


def _parts(
    source: RowSource, format: RowFormat | None, max_rows: int | None, stems: Counter[str], skip: bool
) -> list[_Part]:
    """The files of a source."""
    rows = [_file_rows(name, path, max_rows) for name, path in source.files()]
    found = [each for each in rows if each is not None]
    if not rows or len(found) < len(rows):
        found = [_HeldRows(itertools.islice(source.rows(), max_rows))]
    if not any(map(len, found)):
        raise DataError("holds no rows; give a file with at least one", file=source.name)
    chosen = format or _detect(source.name, found, skip)
    stem = unique_stem(chosen.id_prefix or source.stem, stems)
    starts = itertools.accumulate((len(each) for each in found), initial=0)
    return [
        _Part(source.name, stem, chosen, each, start, source.lines) for each, start in zip(found, starts, strict=False)
    ]


def _file_rows(name: str, path: Path, max_rows: int | None) -> FileRows | None:
    """The rows of a file by number; None if it must be read whole."""
    kind = _kind(path)
    if kind == "lines":
        return LineRows(path, max_rows)
    return ParquetRows(name, path, max_rows) if kind == "parquet" else None


def _kind(path: Path) -> str | None:
    """`lines`, `parquet`, or None for a file that must be read whole, or cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(64) if path.is_file() else b"["
    except OSError:
        return None
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(tuple(COMPRESSED)) or path.suffix == ".parquet":
        return None
    return None if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") else "lines"


def _detect(source: str, files: Sequence[FileRows], skip: bool) -> RowFormat:
    """The format of a source, from its first row, or with `skip` from the first one that has a format."""
    for rows in files:
        for number in range(len(rows)):
            line, row = rows.row(number)
            try:
                with add_location(source, line):
                    if isinstance(row, DataError):
                        raise row
                    return detect_row_format(row)
            except DataError:
                if not skip:
                    raise
    return ROW_FORMATS["pact"]  # none of its rows can be used, in any format


def count_rows(sources: Source | Sequence[Source], max_rows: int | None, limit: int) -> int:
    """Count the rows that can be read one by one. Stops counting after `limit` rows."""
    most = min(max_rows or limit + 1, limit + 1)
    total = 0
    for source in row_sources(sources, max_rows):
        for _, path in source.files():
            total += _count(path, most)
            if total > limit:
                return total
    return total


def _count(path: Path, limit: int) -> int:
    """Rows of a file, at most `limit`: its lines, or the row count of a parquet footer; 0 for other files."""
    kind = _kind(path)
    if kind == "parquet":
        import pyarrow.parquet as pq

        try:
            return min(limit, pq.read_metadata(path).num_rows)
        except Exception:  # reading the row reports the error
            return 0
    count = 0
    if kind == "lines":
        with path.open("rb", buffering=0) as file:
            while count < limit and (chunk := file.read(CHUNK)):
                count += chunk.count(b"\n")
    return min(limit, count)
