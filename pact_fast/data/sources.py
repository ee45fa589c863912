"""Task sources: the prompts of every training step, and the held-out tasks."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pact_fast.config import DataConfig
from pact_fast.data.readers import attach_traces, read_tasks, read_traces
from pact_fast.data.types import Task


class TaskSource(Protocol):
    """Where tasks come from."""

    def train(self, step: int, count: int) -> list[Task]:
        """The `count` prompts of a step: a pure function of the step, so that a resumed run sees the same data."""

    def held_out(self, count: int) -> list[Task]:
        """The first `count` held-out tasks; fewer, or none, if there are not that many."""


class FileTasks:
    """Tasks read from files, in a new order every epoch.

    Raises:
        PactError: A file cannot be read, or a row is wrong; the message names file, line and field.
    """

    def __init__(self, data: DataConfig, seed: int):
        assert data.train is not None
        self._tasks = read_tasks(data.train, data.format, data.max_rows)
        self._eval = read_tasks(data.eval, data.format, data.max_rows) if data.eval else []
        if data.expert:
            known = {task.id for task in self._tasks}
            traces = read_traces(data.expert)
            # with max_rows, traces of rows that were left out are not an error
            attach_traces(self._tasks, {i: t for i, t in traces.items() if i in known} if data.max_rows else traces)
        self._seed, self._shuffle = seed, data.shuffle
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, permutation), the last one that was asked for

    def __iter__(self):
        """All training and held-out tasks, for checks before a run."""
        yield from self._tasks
        yield from self._eval

    def train(self, step: int, count: int) -> list[Task]:
        return [self._at(place) for place in range(step * count, (step + 1) * count)]

    def held_out(self, count: int) -> list[Task]:
        return self._eval[:count]

    def _at(self, place: int) -> Task:
        epoch, index = divmod(place, len(self._tasks))
        if self._shuffle:
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._tasks))
            index = int(self._order[1][index])
        return self._tasks[index]
