"""What trajectories wait for: tool calls and replies of users that run while the engine generates."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait

Pending = Future | str | None  # under way, or the result: an observation, or a reply (None: the episode is over)

# Synchronous engines: a tool's result is picked up exactly this many engine steps after the call, and waited for if it
# is late. Batches then never depend on how fast a tool happened to be, so a run repeats bit for bit.
TOOL_STEPS = 4


class PendingToolCalls:
    """Tool calls and replies of users under way, by trajectory.

    With a synchronous engine, results are due a fixed number of steps after their call, and are waited for; otherwise
    they are picked up as soon as they arrive.
    """

    def __init__(self, synchronous: bool):
        self._synchronous, self._clock = synchronous, 0
        self._calls: list[tuple[int, int, list[Pending]]] = []  # (due at step, trajectory, results)

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, index: int, results: list[Pending], blocking: bool) -> None:
        """What one turn of trajectory `index` waits for; `blocking`: it runs in threads and may take long."""
        self._calls.append((self._clock + (TOOL_STEPS if blocking else 0), index, results))

    def drop(self, index: int) -> bool:
        """Stop waiting for the calls of trajectory `index`, which end by their own timeout; True if there were any."""
        before = len(self._calls)
        self._calls = [call for call in self._calls if call[1] != index]
        return len(self._calls) < before

    def tick(self, *, idle: bool) -> None:
        """Advance the clock after an engine step. `idle`: the engine has nothing to do, so wait for a tool instead."""
        if not idle or not self._calls:
            self._clock += 1
        elif self._synchronous:
            self._clock = max(self._clock, self._calls[0][0])
        else:
            wait([o for call in self._calls for o in call[2] if isinstance(o, Future)], 0.1, FIRST_COMPLETED)

    def due(self) -> list[tuple[int, list[Pending]]]:
        """Remove and return (trajectory, results) of what is to be picked up now."""
        ready = [self._ready(call) for call in self._calls]
        due = [call[1:] for call, now in zip(self._calls, ready, strict=True) if now]
        self._calls = [call for call, now in zip(self._calls, ready, strict=True) if not now]
        return due

    def _ready(self, call: tuple[int, int, list[Pending]]) -> bool:
        if self._synchronous:
            return call[0] <= self._clock
        return all(not isinstance(o, Future) or o.done() for o in call[2])
