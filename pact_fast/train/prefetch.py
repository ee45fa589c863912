"""Work done ahead of its use: rollouts of the next steps are sampled while the current one is trained on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class RolloutPrefetcher(Generic[T]):
    """`make(step)` for one step after another, in a thread, up to `ahead` steps before `get(step)` asks for them.

    With `ahead` = 0 there is no thread: everything happens when it is asked for.
    """

    def __init__(self, make: Callable[[int], T], last: int, ahead: int):
        self._make, self._last, self._ahead = make, last, ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if ahead else None
        self._steps: dict[int, Future[T]] = {}

    def get(self, step: int) -> T:
        """The result of a step; what failed in the thread is raised here."""
        if self._pool is None:
            return self._make(step)
        self._start(step)
        result = self._steps.pop(step).result()
        # only now: what is sampled from here on is used at most `ahead` updates later
        for following in range(step + 1, min(step + self._ahead, self._last - 1) + 1):
            self._start(following)
        return result

    def run(self, work: Callable[[], R]) -> R:
        """Something else with the same engine, after what is under way."""
        return work() if self._pool is None else self._pool.submit(work).result()

    def close(self) -> None:
        """Do not start what has not begun; what has begun ends by itself."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, step: int) -> None:
        assert self._pool is not None
        if step not in self._steps:
            self._steps[step] = self._pool.submit(self._make, step)
