"""Graceful shutdown on SIGTERM, which schedulers send before SIGKILL, and SIGHUP, which a terminal sends when it closes.

The step is finished and saved before the process ends.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pact_fast.errors import ShutdownRequested

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class GracefulShutdown:
    """Context manager that handles SIGTERM and SIGHUP; one that is ignored (nohup) stays ignored.

    While `deferred` is set, a signal sets `requested` and the work continues until the caller checks it; otherwise
    ShutdownRequested is raised in the main thread. A second signal ends the process at once.

    signal_name  of the signal that came, for messages; "SIGTERM" before one has come, and where another rank got it
    """

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False
        self.signal_name = "SIGTERM"
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            self._before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
            self._handle()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Restore the previous handlers meanwhile: for a long wait in C++ code, during which Python handlers do not run."""
        self._restore()
        try:
            yield
        finally:
            self._handle()

    def _handle(self) -> None:
        for number in self._before:
            signal.signal(number, self._handler)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handler(self, number: int, frame: FrameType | None) -> None:
        self.requested, self.signal_name = True, signal.Signals(number).name
        self._restore()
        if not self.deferred:
            raise ShutdownRequested(number)
