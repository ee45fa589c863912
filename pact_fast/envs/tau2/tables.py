"""Copy-on-write tables: an episode copies a record when it first touches it, and shares all others.

The databases of airline and retail hold thousands of records, of which an episode touches a few. A table of an episode
stands for the dict of the package's database: its tools read and write it unchanged.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

_MISSING = "absent"  # of a record that one side has and the other has not; no canonical text equals it


class SharedTable:
    """The records of a table as the package ships them; never changed.

    Args:
        raw: The records as JSON, by id.
        model: The package's pydantic class of a record.
    """

    def __init__(self, raw: dict[str, Any], model: Any):
        self.raw, self._model = raw, model
        self._records: dict[str, Any] = {}
        self._canonical: dict[str, str] = {}
        self._lock = threading.Lock()

    def fresh(self, key: str) -> Any:
        """A copy of a record, to be changed. KeyError if there is none."""
        return self._model.model_validate(self.raw[key])

    def records(self) -> dict[str, Any]:
        """All records, in the order of the file, for reading only."""
        if not self._records:
            with self._lock:
                self._records = self._records or {key: self.fresh(key) for key in self.raw}
        return self._records

    def canonical(self, key: str) -> str:
        """A text that is equal for equal records; `_MISSING` if there is none."""
        if key not in self._canonical:
            self._canonical[key] = canonical(self.fresh(key)) if key in self.raw else _MISSING
        return self._canonical[key]


class EpisodeTable:
    """Table as one episode sees it, with the methods of dict that the package's tools use."""

    def __init__(self, shared: SharedTable):
        self._shared = shared
        self._own: dict[str, Any] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._own or key in self._shared.raw

    def __getitem__(self, key: str) -> Any:
        if key not in self._own:
            self._own[key] = self._shared.fresh(key)
        return self._own[key]

    def __setitem__(self, key: str, record: Any) -> None:
        self._own[key] = record

    def __len__(self) -> int:
        return len(self._shared.raw) + sum(key not in self._shared.raw for key in self._own)

    def __iter__(self) -> Iterator[str]:
        yield from self._shared.raw
        yield from (key for key in self._own if key not in self._shared.raw)

    def items(self) -> Iterator[tuple[str, Any]]:
        """For reading only: records that were not touched are those that all episodes share."""
        records = self._shared.records()
        for key, record in records.items():
            yield key, self._own.get(key, record)
        yield from ((key, record) for key, record in self._own.items() if key not in records)

    def values(self) -> Iterator[Any]:
        """For reading only, as `items`."""
        return (record for _, record in self.items())

    def changes(self) -> dict[str, str]:
        """{id: canonical text} of the records that differ from the shipped ones."""
        texts = {key: canonical(record) for key, record in self._own.items()}
        return {key: text for key, text in texts.items() if text != self._shared.canonical(key)}


def canonical(record: Any) -> str:
    """The text that the package hashes: 1 and 1.0 differ, the order of keys does not count."""
    return json.dumps(record.model_dump(warnings=False), sort_keys=True, default=str)
