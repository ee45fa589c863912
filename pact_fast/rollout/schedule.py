"""Which trajectories of a batch run, which wait for a place, and which are not needed any more."""

from __future__ import annotations

import time
from collections import Counter, deque

from pact_fast.rollout.episode import Episode, Job


class Schedule:
    """The trajectories of one call of `AgentLoop.run`, by index of their job. Every operation takes constant time,
    amortized over the batch.

    running  those under way

    Args:
        jobs: What to sample.
        max_running: Most trajectories at a time.
        keep: Most trajectories of a group. None: all.
        timeout: Seconds that a trajectory may take. None: no limit.
    """

    def __init__(self, jobs: list[Job], max_running: int, keep: int | None, timeout: float | None):
        self.running: dict[int, Episode] = {}
        self._jobs, self._max_running, self._keep, self._timeout = jobs, max_running, keep, timeout
        self._next = 0
        self._by_start: deque[int] = deque()  # all have the same limit of time: who starts first is overdue first
        self._ended: Counter[int] = Counter()  # by group
        self._groups: dict[int, list[int]] = {}
        if keep is not None:
            for index, job in enumerate(jobs):
                self._groups.setdefault(job.group, []).append(index)

    def startable(self) -> int | None:
        """The next trajectory that is needed, if there is a place for it; to be passed to `start`."""
        while self._next < len(self._jobs) and self._is_full(self._jobs[self._next].group):
            self._next += 1
        return self._next if self._next < len(self._jobs) and len(self.running) < self._max_running else None

    def start(self, index: int, episode: Episode) -> None:
        """`index`: as `startable` returned it."""
        self.running[index] = episode
        self._next = index + 1
        if self._timeout is not None:
            self._by_start.append(index)

    def end(self, index: int) -> list[int]:
        """A trajectory has ended, and is not running any more. Returns those of its group that run and are not needed."""
        group = self._jobs[index].group
        self._ended[group] += 1
        return [other for other in self._groups[group] if other in self.running] if self._is_full(group) else []

    def overdue(self) -> list[int]:
        """Trajectories under way that have exceeded the limit of time, in the order of their starts."""
        if self._timeout is None:
            return []
        late, now = [], time.monotonic()
        while self._by_start:
            episode = self.running.get(self._by_start[0])
            if episode is not None:
                if now - episode.started <= self._timeout:
                    break
                late.append(self._by_start[0])
            self._by_start.popleft()
        return late

    def _is_full(self, group: int) -> bool:
        return self._keep is not None and self._ended[group] >= self._keep
