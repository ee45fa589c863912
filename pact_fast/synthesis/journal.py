"""Finished rows of a command on disk, from which it continues after a kill: `pact-fast traces`, `pact-fast data mtr`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pact_fast.errors import PactError
from pact_fast.files import OTHER_FILE_CURE, io_errors
from pact_fast.text import first_difference

JOURNAL = "journal.jsonl"
Record = dict[str, Any]


class Journal:
    """The records of finished rows, in order. A file that was cut by a kill is continued after its last whole line.

    records  of finished rows; each has `reasons`, empty if the row is kept
    summary  of a folder that is complete; None: there is work left

    Args:
        out: The folder; created if it is not there.
        identity: JSON data that every record depends on.
        summary: Name of the file that is written last; it holds the identity as `made_from`.

    Raises:
        PactError: The folder holds the work of another identity, or cannot be written.
    """

    def __init__(self, out: Path, identity: Record, summary: str = "summary.json"):
        self._path, self._identity = out / JOURNAL, identity
        self.records: list[Record] = []
        with io_errors(out, OTHER_FILE_CURE):
            out.mkdir(parents=True, exist_ok=True)
        self.summary = self._finished(out / summary)
        if self.summary is None:
            self._read()

    @property
    def kept(self) -> int:
        return sum(not record["reasons"] for record in self.records)

    def __enter__(self) -> Journal:
        with io_errors(self._path, OTHER_FILE_CURE):
            for half in self._path.parent.glob(".*.????????.tmp"):  # a kill while `write_text` wrote
                half.unlink(missing_ok=True)
            self._file = self._path.open("ab")
            if not self._file.tell():
                self._write(self._identity)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: Record) -> None:
        """Append a record."""
        with io_errors(self._path, OTHER_FILE_CURE):
            self._write(record)
        self.records.append(record)

    def _write(self, value: Record) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def _finished(self, path: Path) -> Record | None:
        if not path.exists():
            return None
        summary = _json(path.read_bytes())
        if not isinstance(summary, dict) or "made_from" not in summary:
            raise PactError(f"{path} is not a file of this command; name another folder with -o")
        self._check(summary["made_from"], path)
        return summary

    def _read(self) -> None:
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        head, *lines = whole.splitlines() or [b""]
        if head:
            self._check(_json(head), self._path)
        with io_errors(self._path, OTHER_FILE_CURE), self._path.open("r+b") as file:
            file.truncate(len(whole))
        self.records = [json.loads(line) for line in lines]

    def _check(self, known: Any, path: Path) -> None:
        if difference := first_difference(known, self._identity):
            raise PactError(
                f"{path} was written with other settings: {difference}; name another folder with -o, or remove this one"
            )


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
