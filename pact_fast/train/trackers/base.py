"""The base class of trackers, and their view of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from pact_fast.errors import PactError


@dataclass(frozen=True)
class TrackedRun:
    """A run as its trackers know it.

    name    for people: the name of the run directory
    id      8 hexadecimal digits, drawn when the run starts and kept when it resumes
    folder  the run directory
    config  its settings, as JSON data, without secrets
    first   the step that it resumes from; 0: a new run. Steps after it, of an earlier process, are repeated
    """

    name: str
    id: str
    folder: Path
    config: Mapping[str, Any]
    first: int = 0


class Tracker:
    """Sends the metrics of a run somewhere. Used on rank 0 only, from one thread.

    Any exception of `__init__`, `log` or `close` becomes a warning, after which the tracker is not called again. A call
    should not wait for a network: training waits for it.
    """

    requires: ClassVar[str] = ""  # package that must be installed, by its import name, which is also its name for pip

    @classmethod
    def check(cls) -> None:
        """Raise PactError if the tracker cannot be used, before anything is loaded; default: `requires` is missing."""
        if cls.requires and find_spec(cls.requires) is None:
            raise PactError(
                f"trainer.report_to: the package {cls.requires} is not installed; pip install {cls.requires}, or leave it "
                "out of trainer.report_to"
            )

    def __init__(self, run: TrackedRun):
        self.run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of a training step or of an evaluation, all finite. One step may have several records."""
        raise NotImplementedError

    def close(self, failed: bool) -> None:
        """Send remaining metrics. `failed`: the run ends by an exception."""
