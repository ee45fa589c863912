"""Ids that occur twice among rows that are not held."""

from __future__ import annotations

import numpy as np

from pact_fast.data.readers import check_new_id
from pact_fast.data.row_files import add_location
from pact_fast.data.sources import FileTasks
from pact_fast.data.types import Task


class UniqueIds:
    """Sees the id of every task, of which it keeps eight bytes.

    Args:
        tasks: Tasks by position.
    """

    def __init__(self, tasks: FileTasks):
        self._tasks = tasks
        self._hashes = np.zeros(len(tasks), np.int64)
        self._seen = np.zeros(len(tasks), bool)

    def see(self, position: int, task: Task) -> None:
        self._hashes[position], self._seen[position] = hash(task.id), True

    def check(self) -> None:
        """DataError that names the place of a row whose id an earlier one of the training or held-out rows has."""
        middle = self._tasks.first_held_out
        for rows in (slice(0, middle), slice(middle, None)):
            positions = np.flatnonzero(self._seen[rows]) + (rows.start or 0)
            hashes = self._hashes[positions]
            order = np.argsort(hashes, kind="stable")
            equal = np.flatnonzero(np.diff(hashes[order]) == 0)
            for index in equal.tolist():
                self._compare(int(positions[order[index]]), int(positions[order[index + 1]]))

    def _compare(self, earlier: int, later: int) -> None:
        first, second = self._tasks[earlier], self._tasks[later]
        if first.id == second.id and first.source and second.source:
            with add_location(*second.source):
                check_new_id(second.id, {first.id: first.source}, second.source[0])
