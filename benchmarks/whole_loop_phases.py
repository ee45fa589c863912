"""Where the time of a training run goes: functions are wrapped, and every moment belongs to the innermost of them."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

OTHER = "other"
PHASES = {
    "generation": "prefill and decoding of the policy's turns",
    "agent loop": "rendering and tokenizing prompts and observations, parsing turns, finding the tool",
    "environment": "reset and tools of the environment",
    "rewards": "reward functions and advantages",
    "batch": "padding or trees and packs, rollout metrics",
    "old log-probs": "forward passes for log-probs before the update",
    "forward and backward": "loss and its gradient",
    "optimizer": "clipping, AdamW, learning rate",
    "weight sync": "new weights for the engine",
    "logging and checkpoints": "metrics, log files, saved models",
    OTHER: "what belongs to none of these",
}
Times = dict[str, float]  # wall and cpu, in seconds


def now() -> Times:
    """Wall-clock time, and CPU time of all threads of this process."""
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


def difference(end: Times, begin: Times) -> Times:
    return {clock: end[clock] - begin[clock] for clock in begin}


class Phases:
    """A stopwatch for training steps: the times at which they ended, and the time of each phase.

    Only the thread that made it is watched; what runs beside it shows in `cpu` alone.
    """

    def __init__(self) -> None:
        self.seconds = {phase: {"wall": 0.0, "cpu": 0.0} for phase in PHASES}
        self.steps: list[Times] = []  # since the start, at the end of each step
        self._stack: list[str] = []
        self._thread = threading.get_ident()

    def start(self) -> None:
        """Begin the first step; further calls do nothing."""
        if not self._stack and not self.steps:
            self._began = self._since = now()
            self._stack = [OTHER]

    def end_step(self, last: bool) -> None:
        """Note that a step has ended; after the last one, nothing is measured any more."""
        self._charge()
        self.steps.append(difference(now(), self._began))
        if last:
            self._stack = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent inside for the phase `name`, without the time of inner phases."""
        if not self._stack or threading.get_ident() != self._thread:
            yield
            return
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            if self._stack:
                self._stack.pop()

    def _charge(self) -> None:
        if self._stack:
            at = now()
            for clock, value in difference(at, self._since).items():
                self.seconds[self._stack[-1]][clock] += value
            self._since = at

    def wrapped(self, function: Callable[..., Any], name: str | Callable[[], str]) -> Callable[..., Any]:
        """`function`, whose time belongs to the phase `name` (or the one that `name()` tells at each call)."""

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name()):
                return function(*args, **kwargs)

        return measured

    def watch(self, stack: contextlib.ExitStack, owner: Any, names: str, phase: str | Callable[[], str]) -> None:
        """Wrap attributes of a class, instance or module until `stack` closes. AttributeError if there is none of the name."""
        for name in names.split():
            stack.enter_context(mock.patch.object(owner, name, self.wrapped(getattr(owner, name), phase)))

    def unexplained(self) -> float:
        """Largest relative difference, over both clocks, of the sum of all phases from the end of the last step."""
        sums = {clock: sum(times[clock] for times in self.seconds.values()) for clock in self._began}
        return max(abs(sums[clock] - total) / max(total, 1e-2) for clock, total in self.steps[-1].items())
