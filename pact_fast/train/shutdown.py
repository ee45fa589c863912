"""Graceful shutdown on SIGTERM, which schedulers send before SIGKILL: finish the step, save a checkpoint, exit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class ShutdownRequested(SystemExit):
    """SIGTERM came while there was nothing to finish. Exit status 143 (128 + SIGTERM), as shells report it."""

    status = 128 + signal.SIGTERM

    def __init__(self) -> None:
        super().__init__(self.status)


class GracefulShutdown:
    """Context manager that handles SIGTERM.

    While `deferred` is set, SIGTERM sets `requested` and the work goes on until the caller checks it; otherwise
    ShutdownRequested is raised in the main thread. A second SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False
        self._before: signal.Handlers | object = None

    def __enter__(self) -> GracefulShutdown:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            self._before = signal.signal(signal.SIGTERM, self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Restore the previous handler meanwhile: for a long wait in C++ code, during which Python handlers do not run."""
        if self._before is None:
            yield
            return
        signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self._handler)

    def _handler(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)  # type: ignore[arg-type]
        if not self.deferred:
            raise ShutdownRequested
