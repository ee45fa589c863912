"""trackio, Hugging Face's tracker: a local database, or a Space."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pact_fast.train.trackers.base import TrackedRun, Tracker
from pact_fast.train.trackers.registry import tracker


@tracker("trackio")
class TrackioTracker(Tracker):
    """A trackio run. TRACKIO_PROJECT, TRACKIO_DIR, TRACKIO_SPACE_ID and the others count.

    trackio resumes a run by its name, so the name holds the id: two runs in directories of one name stay apart.
    """

    requires = "trackio"

    def __init__(self, run: TrackedRun):
        import trackio

        super().__init__(run)
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "pact_fast"),
            name=f"{run.name}-{run.id}",
            config=dict(run.config),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()
