"""Task sources: the tasks of every training step, and the held-out tasks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import numpy as np

from pact_fast.config import DataConfig
from pact_fast.data.prompt_format import format_prompt
from pact_fast.data.readers import attach_traces, read_tasks, read_traces
from pact_fast.data.types import Task
from pact_fast.errors import DataError


class TaskSource(Protocol):
    """Supplies tasks: `FileTasks`, or the tasks that an environment generates."""

    def train(self, step: int, count: int) -> list[Task]:
        """The `count` tasks of a step (from 0). A pure function of the step, so that a resumed run sees the same data."""

    def held_out(self, count: int) -> list[Task]:
        """The first `count` held-out tasks, or all of them if there are fewer."""


class FileTasks:
    """Tasks read from files and datasets. With `data.shuffle`, every epoch has its own order, drawn from the seed.

    Args:
        data: `train` must be set.
        seed: Seed of the orders.
        environments: Names that the column `env` may hold.

    Raises:
        DataError: A source cannot be read, or a row is wrong; the message names source, line and field. With
            data.on_bad_row=skip such rows are left out and listed in `skipped`.
    """

    def __init__(self, data: DataConfig, seed: int, environments: Collection[str]):
        assert data.train
        self.skipped: list[DataError] = []
        on_bad_row = self.skipped.append if data.on_bad_row == "skip" else None
        self._tasks = read_tasks(data.train, data.format, data.max_rows, environments, on_bad_row)
        self._eval = read_tasks(data.eval, data.format, data.max_rows, environments, on_bad_row) if data.eval else []
        if data.expert:
            known = {task.id for task in self._tasks}
            traces = read_traces(data.expert)
            # with max_rows, a trace whose task was not read is no error
            attach_traces(self._tasks, {i: t for i, t in traces.items() if i in known} if data.max_rows else traces)
        self._tasks = [format_prompt(task, data.prompt_format) for task in self._tasks]
        self._eval = [format_prompt(task, data.prompt_format) for task in self._eval]
        self._seed, self._shuffle = seed, data.shuffle
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, permutation) of the last look-up

    def skip(self, errors: Mapping[int, DataError]) -> None:
        """Leave tasks out, given as {position in the order of `__iter__`: the reason}.

        Raises:
            DataError: No training task is left, or no held-out task where there were some.
        """
        self.skipped += errors.values()
        first = len(self._tasks)
        train = [task for position, task in enumerate(self._tasks) if position not in errors]
        held_out = [task for position, task in enumerate(self._eval, first) if position not in errors]
        for before, left in ((self._tasks, train), (self._eval, held_out)):
            if before and not left:
                file = before[0].source[0] if before[0].source else ""
                reason = next(iter(errors.values())) if before is self._tasks else errors[first]
                raise DataError(f"none of its {len(before):,} tasks can be used; the first: {reason}", file=file)
        self._tasks, self._eval = train, held_out

    def __len__(self) -> int:
        return len(self._tasks) + len(self._eval)

    def __iter__(self) -> Iterator[Task]:
        """All training tasks, then all held-out tasks."""
        yield from self._tasks
        yield from self._eval

    def training(self) -> list[Task]:
        """All training tasks, in the order of the file."""
        return self._tasks

    def train(self, step: int, count: int) -> list[Task]:
        return [self._task(position) for position in range(step * count, (step + 1) * count)]

    def held_out(self, count: int) -> list[Task]:
        return self._eval[:count]

    def _task(self, position: int) -> Task:
        """The task at a position in the sequence of all epochs."""
        epoch, index = divmod(position, len(self._tasks))
        if self._shuffle:
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._tasks))
            index = int(self._order[1][index])
        return self._tasks[index]
