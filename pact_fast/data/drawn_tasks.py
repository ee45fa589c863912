"""Tasks that are read, and checked, when they are drawn for the first time.

A row that cannot be used ends the run, or, with data.on_bad_row=skip, another row is drawn in its place. Which one, is a
function of the seed and of the place in the order of the epoch: all ranks, and a run that is resumed, draw the same one,
whatever else they have drawn before.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from pact_fast.data.indexed_tasks import IndexedTasks
from pact_fast.data.types import Task
from pact_fast.errors import DataError

CHECKED_FIRST = 2000  # rows of a file that are looked at before the first step
CHECKED_ANYWHERE = 2000  # and rows from anywhere, drawn from the seed
MAX_REDRAWS = 1000  # rows that are drawn in place of one that cannot be used


Check = Callable[[Task], object]


class DrawnTasks:
    """Tasks by position, of which none is held.

    Args:
        tasks: The rows.
        skip: Draw another row in place of one that cannot be used; else that is an error.
        skipped: Gets the error of each row that was found to be of no use, once.
    """

    def __init__(self, tasks: IndexedTasks, skip: bool, skipped: list[DataError]):
        self._tasks, self._skip, self._skipped = tasks, skip, skipped
        self._checks: tuple[Check, ...] = ()
        self._passed = np.zeros(len(tasks), bool)
        self._bad: dict[int, DataError] = {}
        self._lock = threading.Lock()  # rollouts of coming steps are sampled in a thread

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, position: int) -> Task:
        """The task at a position. DataError if the row cannot be used."""
        with self._lock:
            if position in self._bad:
                raise self._bad[position]
            try:
                task = self._tasks[position]
                if self._checks and not self._passed[position]:
                    for check in self._checks:
                        check(task)
                    self._passed[position] = True
            except DataError as error:
                self.leave_out(position, error)
                raise
            return task

    def check_with(self, *checks: Check) -> None:
        """Check each task before it is drawn for the first time."""
        self._checks = checks

    def leave_out(self, position: int, error: DataError) -> None:
        """Note that a row cannot be used."""
        if position not in self._bad:
            self._bad[position] = error
            self._skipped.append(error)

    def draw(self, position: int, seed: Sequence[int]) -> Task:
        """The task at a position, or another one, a function of `seed`, if the row cannot be used and may be skipped."""
        for candidate in self._candidates(position, seed):
            try:
                return self[candidate]
            except DataError as error:
                if not self._skip:
                    raise
                last = error
        raise DataError(
            f"{last.problem}; none of {MAX_REDRAWS:,} rows drawn in its place can be used either", file=last.file
        )

    def _candidates(self, position: int, seed: Sequence[int]) -> Iterator[int]:
        yield position
        yield from np.random.default_rng(seed).integers(len(self), size=MAX_REDRAWS).tolist()

    def first(self, count: int) -> list[Task]:
        """The first `count` tasks that can be used, or all of them if there are fewer."""
        return list(itertools.islice(self.usable(range(len(self))), count))

    def usable(self, positions: Iterable[int]) -> Iterator[Task]:
        """The tasks at positions, without those that cannot be used if they may be skipped."""
        for position in positions:
            try:
                yield self[position]
            except DataError:
                if not self._skip:
                    raise

    def sample(self, seed: int) -> list[int]:
        """Positions to look at before the first step: the first ones, some from anywhere, and those that look wrong."""
        anywhere = np.random.default_rng((seed, len(self))).integers(len(self), size=CHECKED_ANYWHERE)
        first = np.arange(min(CHECKED_FIRST, len(self)))
        return np.unique(np.concatenate([first, anywhere, self._tasks.suspects()]).astype(np.int64)).tolist()
