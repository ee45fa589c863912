"""Prefetching: rollouts of the next steps are sampled in a thread while the current step is trained on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class RolloutPrefetcher(Generic[T]):
    """Runs `make(step)` in a thread, up to `ahead` steps before `get(step)` asks for the result.

    With `ahead` = 0 there is no thread, and `get` runs `make` itself.

    Args:
        make: Produces the result of a step.
        last: Number of steps of the run; none beyond is started.
        ahead: How many steps may be prefetched.
    """

    def __init__(self, make: Callable[[int], T], last: int, ahead: int):
        self._make, self._last, self._ahead = make, last, ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if ahead else None
        self._steps: dict[int, Future[T]] = {}

    def get(self, step: int) -> T:
        """The result of a step. An exception in the thread is raised here."""
        if self._pool is None:
            return self._make(step)
        self._start(step)
        result = self._steps.pop(step).result()
        # only after the wait above: rollouts that start now must be used at most `ahead` updates later
        for following in range(step + 1, min(step + self._ahead, self._last - 1) + 1):
            self._start(following)
        return result

    def run(self, work: Callable[[], R]) -> R:
        """Run other work on the same engine, after the prefetches that were started."""
        return work() if self._pool is None else self._pool.submit(work).result()

    def close(self) -> None:
        """Cancel prefetches that have not begun; running ones finish in the background."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, step: int) -> None:
        assert self._pool is not None
        if step not in self._steps:
            self._steps[step] = self._pool.submit(self._make, step)
