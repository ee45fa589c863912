"""The trackers of a run, isolated from it: one that fails is a warning."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pact_fast.config import Config
from pact_fast.config.secrets import without_secrets
from pact_fast.files import write_text
from pact_fast.plugins import describe_error
from pact_fast.train.trackers.base import TrackedRun, Tracker
from pact_fast.train.trackers.registry import tracker_classes

ID_FILE = "tracking_id"  # in the run directory


class Trackers:
    """All trackers of a run.

    Args:
        classes: Their classes by name.
        run: The run.
        note: Prints a warning.
    """

    def __init__(self, classes: Mapping[str, type[Tracker]], run: TrackedRun, note: Callable[[str], None]):
        self._note = note
        self._open: dict[str, Tracker] = {}
        for name, cls in classes.items():
            made = self._attempt(name, lambda cls=cls: cls(run))  # type: ignore[misc]
            if made is not None:
                self._open[name] = made

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the finite numbers among `values` to every tracker."""
        numbers = {key: float(value) for key, value in values.items() if _is_number(value)}
        for name, one in list(self._open.items()):
            self._attempt(name, lambda one=one: one.log(step, numbers))  # type: ignore[misc]

    def close(self, failed: bool) -> None:
        """Close all. `failed`: the run ends by an exception."""
        for name, one in list(self._open.items()):
            self._attempt(name, lambda one=one: one.close(failed))  # type: ignore[misc]
        self._open.clear()

    def _attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of a call; after an exception, a warning and None, and the tracker is out."""
        try:
            return call()
        except Exception as error:  # packages and networks may raise anything
            self._open.pop(name, None)
            self._note(
                f"warning: trainer.report_to: {name} failed and gets no more metrics of this process "
                f"({describe_error(error)[:300]}); metrics.jsonl has all of them"
            )
            return None


def open_trackers(config: Config, run: Path, first: int, note: Callable[[str], None]) -> Trackers:
    """The trackers that `trainer.report_to` names.

    Args:
        config: Settings of the run; trackers get them without secrets.
        run: The run directory.
        first: The step that the run resumes from, 0 for a new one.
        note: Prints a line.
    """
    classes = tracker_classes(config.trainer.report_to)
    settings = without_secrets(config.model_dump(mode="json"))
    tracked = TrackedRun(run.resolve().name, _run_id(run, first), run, settings, first)
    return Trackers(classes, tracked, note)


def _run_id(run: Path, first: int) -> str:
    """The run's id: a new one for a new run, else the one in its directory."""
    file = run / ID_FILE
    if first and file.is_file() and (found := file.read_text(encoding="utf-8").strip()):
        return found
    drawn = secrets.token_hex(4)
    write_text(file, drawn + "\n")
    return drawn


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
