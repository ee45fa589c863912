"""Rows of one file: JSON lines, a JSON array or parquet, as they are written there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pact_fast.data.rows import OWN_FIELDS, Row, read_json, type_name
from pact_fast.data.schemas import drop_nulls
from pact_fast.errors import PASSED_ON, DataError, PactError, error_line
from pact_fast.limits import memory_limit

NumberedRow = tuple[int, "Row | DataError"]  # line or row number from 1
PARQUET_BATCH = 256  # rows held both as Arrow and as Python objects
BATCH_BYTES = 2**30  # of a batch
# address space, not memory: Arrow's allocator takes a GiB at once, and each of its threads 64 MiB and more
RESERVED = 2**32
MAX_RATIO = 1000  # of the rows' size to the file's; repeated tool schemas reach 200
COMPRESSED = {  # first bytes of a file -> compression
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}


@contextmanager
def add_location(place: str | Path, line: int | None = None) -> Iterator[None]:
    """Adds the file (or other place) and the line to a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(error.problem, file=str(place), line=line, field=error.field) from None


def file_rows(path: Path) -> Iterator[NumberedRow]:
    """(line or row number from 1, the row or the reason why it cannot be read) of a file.

    The first bytes of the file decide its type, not its name. Raises DataError if the file cannot be read or is empty.
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
            yield from not_empty(str(path), rows_of(str(path), file))
    except OSError as error:
        raise DataError(f"cannot read: {error_line(error)}", file=str(path)) from None


def not_empty(name: str, rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
    """The rows. DataError if there is none."""
    first = next(rows, None)
    if first is None:
        raise DataError("holds no rows; give a file with at least one", file=name)
    yield first
    yield from rows


def rows_of(name: str, file: BinaryIO) -> Iterator[NumberedRow]:
    """The rows of an open file. `name`: for messages; its ending tells a damaged parquet file from text."""
    head = file.read(64)
    file.seek(0)
    for magic, compression in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"is {compression}-compressed; decompress it first", file=name)
    if head.startswith(b"PAR1"):
        return _parquet_rows(name, file)
    if PurePosixPath(name).suffix == ".parquet":
        raise DataError("is not a parquet file; check that it was copied whole", file=name)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _array_rows(name, file)
    return _line_rows(file)


def _line_rows(file: BinaryIO) -> Iterator[NumberedRow]:
    for line, raw in enumerate(file, 1):
        try:
            row = line_row(raw)
        except DataError as error:
            yield line, error
        else:
            if row is not None:
                yield line, row


def line_row(raw: bytes) -> Row | None:
    """The row in a line; None if the line is blank. DataError, without its place, if the line cannot be read."""
    text = decode(raw).strip()
    return _object(read_json(text, ""), "a line") if text else None


def _array_rows(name: str, file: BinaryIO) -> Iterator[NumberedRow]:
    with add_location(name):
        rows = read_json(decode(file.read()), "")
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


def decode(raw: bytes) -> str:
    """The text of a line or file. DataError, without its place, if it is not UTF-8."""
    if b"\0" in raw:
        raise DataError("has NUL bytes; the file is damaged or UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None


def _parquet_rows(name: str, file: BinaryIO) -> Iterator[NumberedRow]:
    number = 0
    with parquet_errors(name):
        for batch in parquet_batches(name, file):
            for row in range(batch.num_rows):
                number += 1
                try:
                    values: Row | DataError = batch_row(batch, row)
                except DataError as error:
                    values = error
                yield number, values


def parquet_batches(name: str, file: BinaryIO) -> Iterator[Any]:
    """Batches of at most PARQUET_BATCH rows, without the index columns of pandas.

    Raises DataError for a file that is damaged, or was made to become far larger than its compressed bytes.
    """
    import pyarrow.parquet as pq

    with parquet_errors(name):
        parquet = pq.ParquetFile(file, pre_buffer=False)  # a part of a remote file is read as such
        columns = [c for c in parquet.schema_arrow.names if not c.startswith("__index_level_")]
        for batch in _batches(parquet, name, file.seek(0, os.SEEK_END)):
            yield batch.select(columns)


@contextmanager
def parquet_errors(name: str) -> Iterator[None]:
    """Turn any exception of the reader of a damaged file into a DataError."""
    try:
        yield
    except PASSED_ON:
        raise
    except BaseException as error:
        raise DataError(f"is not a readable parquet file ({error_line(error)}); write it again", file=name) from None


def batch_row(batch: Any, number: int) -> Row:
    """A row of an Arrow batch as Python values. DataError, without its place, if a value has none."""
    return {column: _value(batch.column(column)[number], column) for column in batch.schema.names}


def _batches(parquet: Any, name: str, compressed: int) -> Iterator[Any]:
    decoded = 0
    batches = parquet.iter_batches(PARQUET_BATCH)
    try:
        while True:
            with memory_limit(BATCH_BYTES, f"reading {PARQUET_BATCH} of its rows", RESERVED):
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
        raise DataError(f"{error}, as in a file made to exhaust the memory; write it again", file=name) from None


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


def _value(scalar: Any, column: str) -> Any:
    """The Python value of an Arrow scalar. Bad UTF-8 and out-of-range times raise ValueError."""
    try:
        # rows.py cleans our own columns: an argument that is required and nullable keeps its null
        return scalar.as_py() if column in OWN_FIELDS else drop_nulls(scalar.as_py())
    except (ValueError, OverflowError) as error:
        raise DataError(f"cannot be read: {error_line(error)}; write the column again", field=column) from None
