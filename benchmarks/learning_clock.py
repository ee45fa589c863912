"""A tracker that notes when each training step ended: CPU seconds of this process, and wall clock."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from pact_fast.train.trackers.base import TrackedRun, Tracker

FILE = "clock.jsonl"


class Clock(Tracker):
    """Appends {step, cpu, wall} to clock.jsonl of the run; the first line, of step 0, is the time before training."""

    def __init__(self, run: TrackedRun):
        super().__init__(run)
        self._note(run.first)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._note(step)

    def close(self, failed: bool) -> None:
        """Nothing is left to send."""

    def _note(self, step: int) -> None:
        line = {"step": step, "cpu": time.process_time(), "wall": time.perf_counter()}
        with (self.run.folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
