"""The registry of trackers: `@tracker("name")` above a subclass of `Tracker`."""

from __future__ import annotations

from pact_fast.config import source_names
from pact_fast.errors import PactError
from pact_fast.registry import Registry
from pact_fast.train.trackers.base import Tracker

NONE = "none"

tracker: Registry[type[Tracker]] = Registry("tracker", "trainer.report_to", "pact_fast.train.trackers", base=Tracker)


def tracker_classes(report_to: str | list[str]) -> dict[str, type[Tracker]]:
    """The classes that `trainer.report_to` names, by name; empty for `none`.

    Raises:
        PactError: A name is unknown (names the nearest), its class cannot be loaded, or `none` is one of several.
    """
    names = source_names(report_to)
    if NONE in names and len(names) > 1:
        raise PactError(f"trainer.report_to: '{NONE}' cannot be combined with other names; remove it, or them")
    return {name: tracker.get(name) for name in names if name != NONE}


def check_trackers(report_to: str | list[str]) -> None:
    """PactError if a tracker is unknown or cannot be used here, for instance because its package is missing."""
    for found in tracker_classes(report_to).values():
        found.check()
