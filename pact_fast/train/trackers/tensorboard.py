"""TensorBoard: event files in the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pact_fast.train.trackers.base import TrackedRun, Tracker
from pact_fast.train.trackers.registry import tracker

FOLDER = "tensorboard"  # in the run directory


@tracker("tensorboard")
class TensorBoardTracker(Tracker):
    """Scalars in run/tensorboard. Steps that a resumed run repeats take the place of those that were lost."""

    requires = "tensorboard"

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(run)
        self._writer = SummaryWriter(str(run.folder / FOLDER), purge_step=run.first + 1 if run.first else 0)
        settings = json.dumps(run.config, indent=2, ensure_ascii=False)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in settings.splitlines()), run.first)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()
