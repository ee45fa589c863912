"""An index of the rows of a JSON lines file: where each begins. Rows are read and parsed when they are asked for.

The index is read at the place that is asked for: neither memory nor open files grow with the number of rows and files, as
they would with maps of thousands of files, and what the processes of a node read is in the page cache once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pact_fast.data.row_cache import CacheEntry
from pact_fast.data.row_files import NumberedRow, decode, line_row
from pact_fast.errors import DataError, PactError, error_line

CHUNK = 1 << 23  # bytes read at a time
MAX_SUSPECTS = 1000
_OFFSETS, _BLANKS, _SUSPECTS = "offsets", "blanks", "suspects.json"


class LineRows:
    """Rows of a JSON lines file by number.

    suspects  numbers of rows that do not look like a JSON object in UTF-8, at most MAX_SUSPECTS

    Args:
        path: The file.
        limit: Read only this many rows; None: all.

    Raises:
        PactError: The file cannot be read, or has changed, or the index cannot be written.
    """

    def __init__(self, path: Path, limit: int | None = None):
        self._path = path
        self._index = CacheEntry(path, f"lines-{limit or 'all'}", lambda folder: write_index(path, limit, folder))
        folder = self._index.folder
        self._length = (folder / _OFFSETS).stat().st_size // 8 - 1
        self._blanks = np.fromfile(folder / _BLANKS, np.uint64)
        self.suspects: list[int] = json.loads((folder / _SUSPECTS).read_text(encoding="ascii"))

    def __len__(self) -> int:
        return self._length

    def row(self, number: int) -> NumberedRow:
        """(line from 1, the row or the reason why it cannot be read). FileChanged if the file is another one meanwhile."""
        line = number + 1 + int(np.searchsorted(self._blanks, number, "right"))
        with read_errors(self._path), self._path.open("rb", buffering=0) as file:
            self._index.check(file.fileno())
            with self._index.open(_OFFSETS) as index:
                first, end = np.frombuffer(read_fully(index, 8 * number, 8 * number + 16), np.uint64).tolist()
            raw = read_fully(file, first, end)
        try:
            row = line_row(raw.partition(b"\n")[0])  # blank lines may follow
            assert row is not None
        except DataError as error:
            return line, error
        return line, row


def read_fully(file: BinaryIO, first: int, end: int) -> bytes:
    """Bytes [first, end) of a file."""
    file.seek(first)
    data = file.read(end - first)
    while len(data) < end - first and (more := file.read(end - first - len(data))):
        data += more
    return data


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """PactError, and not an error of a row that could be skipped, if a file cannot be read."""
    try:
        yield
    except OSError as error:
        raise PactError(f"{path}: cannot read: {error_line(error)}") from None


def write_index(path: Path, limit: int | None, folder: Path) -> None:
    """Write offsets (uint64, one for each row, and the end), blank lines and suspects of a file to a folder.

    A blank line is written as the number of rows before it, so that a row's line is found by bisection.
    """
    rows, end = 0, 0
    suspects: list[int] = []
    with (folder / _OFFSETS).open("wb") as offsets, (folder / _BLANKS).open("wb") as blank_file:
        for base, chunk in _chunks(path):
            found = _Lines(chunk)
            kept = found.rows if limit is None else found.rows[: limit - rows]
            (found.starts[kept] + base).astype(np.uint64).tofile(offsets)
            before = rows + np.searchsorted(found.rows, found.blanks)
            before.astype(np.uint64).tofile(blank_file)
            odd = rows + np.searchsorted(found.rows, found.suspects)
            suspects += odd[: MAX_SUSPECTS - len(suspects)].tolist()
            end = base + int(found.starts[found.rows[len(kept)]] if len(kept) < len(found.rows) else len(chunk))
            rows += len(kept)
            if rows == limit:
                break
        np.array([end], np.uint64).tofile(offsets)
    (folder / _SUSPECTS).write_text(json.dumps([number for number in suspects if number < rows]), encoding="ascii")


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(position in the file, whole lines). Each ends with a newline, which the last one gets if it has none."""
    with read_errors(path), path.open("rb", buffering=0) as file:
        base, rest = 0, b""
        while block := file.read(max(CHUNK, len(rest))):
            cut = block.rfind(b"\n") + 1
            if not cut:
                rest += block
                continue
            chunk = rest + block[:cut]
            yield base, chunk
            base, rest = base + len(chunk), block[cut:]
        if rest:
            yield base, rest + b"\n"


class _Lines:
    """The lines of a chunk.

    starts    where each begins
    rows      numbers of those that are not blank
    blanks    numbers of the blank ones
    suspects  numbers of rows that do not begin with { and end with }, or hold a NUL byte or invalid UTF-8
    """

    def __init__(self, chunk: bytes):
        data = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        self.starts = np.concatenate([[0], ends[:-1] + 1])
        last = data[np.maximum(ends - 1, self.starts)]
        odd = data[self.starts] != ord("{")
        self.blanks = np.array([n for n in np.flatnonzero(odd) if _is_blank(chunk[self.starts[n] : ends[n]])], np.int64)
        odd |= (last != ord("}")) & (last != ord("\r"))
        if b"\0" in chunk or not _is_utf8(chunk):
            odd |= np.array([_is_damaged(chunk[a:b]) for a, b in zip(self.starts, ends, strict=True)])
        odd[self.blanks] = False
        self.suspects = np.flatnonzero(odd)
        self.rows = np.setdiff1d(np.arange(len(ends)), self.blanks, assume_unique=True)


def _is_utf8(data: bytes) -> bool:
    try:
        return data.isascii() or bool(data.decode())
    except UnicodeDecodeError:
        return False


def _is_damaged(line: bytes) -> bool:
    return b"\0" in line or not _is_utf8(line)


def _is_blank(line: bytes) -> bool:
    try:
        return not decode(line).strip()
    except DataError:
        return False
