"""Task sources: the tasks of every training step, and the held-out tasks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from pact_fast.config import DataConfig
from pact_fast.data.drawn_tasks import Check, DrawnTasks
from pact_fast.data.indexed_tasks import IndexedTasks, count_rows
from pact_fast.data.prompt_format import format_prompt
from pact_fast.data.readers import attach_traces, read_tasks, read_traces
from pact_fast.data.types import Task
from pact_fast.errors import DataError

HELD_ROWS = 10_000  # more rows than that are not held in memory
_ORDERS = 2  # permutations that are kept: dynamic sampling takes turns between two epochs
_SUBSTITUTE = 1  # marks the seeds of rows that are drawn in place of others


class TaskSource(Protocol):
    """Supplies tasks: `FileTasks`, or the tasks that an environment generates."""

    def train(self, step: int, count: int) -> list[Task]:
        """The `count` tasks of a step (from 0). A pure function of the step, so that a resumed run sees the same data."""

    def held_out(self, count: int) -> list[Task]:
        """The first `count` held-out tasks, or all of them if there are fewer."""


class FileTasks:
    """Tasks read from files and datasets. With `data.shuffle`, every epoch has its own order, drawn from the seed.

    More than HELD_ROWS training rows, or held-out rows, are not held in memory: a row is read when it is drawn (docs/data.md,
    "Large data"). Rows with traces in a file of their own (data.expert) are always held.

    Args:
        data: `train` must be set.
        seed: Seed of the orders.
        environments: Names that the column `env` may hold.

    Raises:
        DataError: A source cannot be read, or a row that was read is wrong; the message names source, line and field.
            With data.on_bad_row=skip such rows are left out and listed in `skipped`.
    """

    def __init__(self, data: DataConfig, seed: int, environments: Collection[str]):
        assert data.train
        self.skipped: list[DataError] = []
        self._data, self._seed, self._environments = data, seed, environments
        self._train = self._read(data.train, hold=bool(data.expert))
        self._eval = self._read(data.eval) if data.eval else []
        if data.expert and isinstance(self._train, list):
            known = {task.id for task in self._train}
            traces = read_traces(data.expert)
            # with max_rows, a trace whose task was not read is no error
            attach_traces(self._train, {i: t for i, t in traces.items() if i in known} if data.max_rows else traces)
        self._orders: dict[int, np.ndarray] = {}  # of the epochs that were looked up last

    def _read(self, names: str | list[str], hold: bool = False) -> list[Task] | DrawnTasks:
        """The tasks of files: held, or read when they are drawn if there are many."""
        data, skip = self._data, self._data.on_bad_row == "skip"
        if not hold and count_rows(names, data.max_rows, HELD_ROWS) > HELD_ROWS:
            rows = IndexedTasks(names, data.format, data.max_rows, self._environments, data.prompt_format, skip)
            return DrawnTasks(rows, skip, self.skipped)
        on_bad_row = self.skipped.append if skip else None
        tasks = read_tasks(names, data.format, data.max_rows, self._environments, on_bad_row)
        return [format_prompt(task, data.prompt_format) for task in tasks]

    @property
    def reads_when_drawn(self) -> bool:
        """Whether there are rows that are read, and checked, when they are drawn."""
        return isinstance(self._train, DrawnTasks) or isinstance(self._eval, DrawnTasks)

    def check_drawn(self, check: Check, check_training: Check) -> None:
        """Check rows that are read when they are drawn, each before it is drawn for the first time.

        Args:
            check: Raises DataError for a task that cannot be used, which may be skipped.
            check_training: Raises PactError for a training task that is an error in any case.
        """
        if isinstance(self._train, DrawnTasks):
            self._train.check_with(check, check_training)
        if isinstance(self._eval, DrawnTasks):
            self._eval.check_with(check)

    def skip(self, errors: Mapping[int, DataError]) -> None:
        """Leave tasks out, given as {position in the order of `__iter__`: the reason}.

        Raises:
            DataError: No training task is left, or no held-out task where there were some.
        """
        first = len(self._train)
        here = {position: error for position, error in errors.items() if position < first}
        there = {position - first: error for position, error in errors.items() if position >= first}
        self._train, self._eval = self._without(self._train, here), self._without(self._eval, there)

    def _without(self, tasks: list[Task] | DrawnTasks, errors: Mapping[int, DataError]) -> list[Task] | DrawnTasks:
        if isinstance(tasks, DrawnTasks):
            for position, error in errors.items():
                tasks.leave_out(position, error)
            return tasks
        self.skipped += errors.values()
        left = [task for position, task in enumerate(tasks) if position not in errors]
        if tasks and not left:
            file = tasks[0].source[0] if tasks[0].source else ""
            reason = next(iter(errors.values()))
            raise DataError(f"none of its {len(tasks):,} tasks can be used; the first: {reason}", file=file)
        return left

    def __len__(self) -> int:
        return len(self._train) + len(self._eval)

    @property
    def first_held_out(self) -> int:
        """Position of the first held-out task in the order of `__iter__`."""
        return len(self._train)

    def __getitem__(self, position: int) -> Task:
        """The task at a position in the order of `__iter__`. DataError if its row cannot be used."""
        first = len(self._train)
        return self._train[position] if position < first else self._eval[position - first]

    def __iter__(self) -> Iterator[Task]:
        """All training tasks, then all held-out tasks."""
        return (self[position] for position in range(len(self)))

    def sample(self) -> list[int]:
        """Positions, in the order of `__iter__`, of the tasks that are checked before the first step.

        These are all tasks that are held, and some of the others, a function of seed and files.
        """
        return self._sample(self._train) + [len(self._train) + position for position in self._sample(self._eval)]

    def _sample(self, tasks: list[Task] | DrawnTasks) -> list[int]:
        return tasks.sample(self._seed) if isinstance(tasks, DrawnTasks) else list(range(len(tasks)))

    def training(self) -> Sequence[Task]:
        """The training tasks in the order of the file: all of them, or those of the sample that can be used."""
        if not isinstance(self._train, DrawnTasks):
            return self._train
        return list(self._train.usable(self._sample(self._train)))

    def train(self, step: int, count: int) -> list[Task]:
        return [self._task(position) for position in range(step * count, (step + 1) * count)]

    def held_out(self, count: int) -> list[Task]:
        return self._eval.first(count) if isinstance(self._eval, DrawnTasks) else self._eval[:count]

    def _task(self, position: int) -> Task:
        """The task at a position in the sequence of all epochs."""
        epoch, place = divmod(position, len(self._train))
        index = int(self._order(epoch)[place]) if self._data.shuffle else place
        if isinstance(self._train, DrawnTasks):
            return self._train.draw(index, (self._seed, epoch, place, _SUBSTITUTE))
        return self._train[index]

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch."""
        order = self._orders.get(epoch)
        if order is None or len(order) != len(self._train):
            drawn = np.random.default_rng((self._seed, epoch)).permutation(len(self._train))
            order = drawn.astype(np.uint32)
            kept = list(self._orders.items())[1 - _ORDERS :]  # replaced as a whole: other threads look things up
            self._orders = {**dict(kept), epoch: order}
        return order
