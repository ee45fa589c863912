"""Faults that tests inject into runs (runs.py)."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def at_call(place: str, number: int, act: Callable[..., Any]) -> None:
    """Call `act(arguments of the call)` when the method `module:Class.name` is entered for the `number`-th time, from 1."""
    module, _, path = place.partition(":")
    owner, name = path.split(".")
    holder = getattr(importlib.import_module(module), owner)
    original, calls = getattr(holder, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act(*args)
        return original(*args, **kwargs)

    setattr(holder, name, counted)


def terminate(mark: Path, *_: object) -> None:
    """SIGTERM to this process; the file `mark` gets the time."""
    mark.write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGTERM)


def seconds_since(mark: Path) -> float:
    return time.monotonic() - float(mark.read_text())
