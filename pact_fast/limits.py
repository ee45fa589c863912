"""Limits of time and memory for work on files from strangers, which may have been made to take all of both.

Standard library only.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pact_fast.errors import PactError

TICK = 0.1  # seconds between looks at the clock


class _TimeIsUp(BaseException):
    """Not an Exception, so that code that catches Exception does not continue."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """PactError that says "`what` takes more than … s" once this thread has computed for so long.

    The thread's CPU time counts, so that a busy machine costs nothing. Without effect outside the main thread, where
    Python runs no signal handlers, and where SIGALRM is in use.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    end = time.thread_time() + seconds

    def look(number: int, frame: FrameType | None) -> None:
        if time.thread_time() > end:
            raise _TimeIsUp

    before: Any = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
    try:
        yield
    except _TimeIsUp:
        raise PactError(f"{what} takes more than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


@contextmanager
def memory_limit(size: int, what: str, reserved: int = 0) -> Iterator[None]:
    """PactError that says "`what` takes more than … GB" if the process grows by more than `size` bytes. Linux only.

    What is limited is the address space of the process, of which allocators and threads may take `reserved` bytes more
    without using them.
    """
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + size + reserved
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError:
        raise PactError(f"{what} takes more than {size / 2**30:g} GB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
