"""SIGTERM, which schedulers send before they kill: finish the step, save, end well."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """`asked` becomes true when the process is sent SIGTERM while this is open; a second one ends it at once, as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: signal.Handlers | object = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python has signals there only
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)  # type: ignore[arg-type]
