"""Pending results: tool calls and replies of users that run while the engine generates."""

from __future__ import annotations

import heapq
import itertools
import queue
from concurrent.futures import Future

Pending = Future | str | None  # under way, or the result: an observation, or a reply (None: the episode is over)

# Synchronous engines: a tool's result is picked up exactly this many engine steps after the call, and waited for if it
# is late. Batches then never depend on how fast a tool happened to be, so a run repeats bit for bit.
TOOL_STEPS = 4


class PendingToolCalls:
    """Tool calls and replies of users under way, by trajectory; a step looks only at those that are due.

    With a synchronous engine, results are due a fixed number of steps after their call, and are waited for; otherwise
    they are picked up as soon as they arrive.
    """

    def __init__(self, synchronous: bool):
        self._synchronous, self._clock = synchronous, 0
        self._calls: dict[int, list[Pending]] = {}  # by trajectory
        self._due: list[tuple[int, int, int]] = []  # heap of (due at step, order of calls, trajectory), if synchronous
        self._order = itertools.count()
        # otherwise: trajectories, once for each result that has arrived, and how many are missing
        self._arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._missing: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, index: int, results: list[Pending], blocking: bool) -> None:
        """Wait for the results of one turn of trajectory `index`. `blocking`: they run in threads and may take long."""
        self._calls[index] = results
        if self._synchronous:
            heapq.heappush(self._due, (self._clock + (TOOL_STEPS if blocking else 0), next(self._order), index))
            return
        self._missing[index] = len(results)
        for result in results:
            if isinstance(result, Future):
                result.add_done_callback(lambda _: self._arrived.put(index))  # in the thread of the tool
            else:
                self._arrived.put(index)

    def drop(self, index: int) -> bool:
        """Stop waiting for the calls of trajectory `index`, which end by their own timeout; True if there were any.

        The trajectory must be over: it may not be added again.
        """
        self._missing.pop(index, None)
        return self._calls.pop(index, None) is not None

    def tick(self, *, idle: bool) -> None:
        """Advance the clock after an engine step. `idle`: the engine has nothing to do, so wait for a tool instead."""
        if not idle or not self._calls:
            self._clock += 1
        elif self._synchronous:
            while self._due[0][2] not in self._calls:  # dropped
                heapq.heappop(self._due)
            self._clock = max(self._clock, self._due[0][0])
        else:
            try:
                self._arrived.put(self._arrived.get(timeout=0.1))
            except queue.Empty:
                return

    def due(self) -> list[tuple[int, list[Pending]]]:
        """Remove and return the due results as (trajectory, results)."""
        indices = self._due_by_clock() if self._synchronous else self._complete()
        return [(index, self._calls.pop(index)) for index in indices if index in self._calls]

    def _due_by_clock(self) -> list[int]:
        indices = []
        while self._due and self._due[0][0] <= self._clock:
            indices.append(heapq.heappop(self._due)[2])
        return indices

    def _complete(self) -> list[int]:
        """Trajectories whose last missing result has arrived."""
        complete = []
        for _ in range(self._arrived.qsize()):
            index = self._arrived.get()
            if index in self._missing:
                self._missing[index] -= 1
                if not self._missing[index]:
                    del self._missing[index]
                    complete.append(index)
        return complete
