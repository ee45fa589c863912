"""Standard output and error of a process whose work matters more than its messages.

A terminal that closes, a `tee` that is killed, `head` that has seen enough, a full disk behind `2>`: none of these may end
a run. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any, TextIO

NO_READER = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ESHUTDOWN, errno.ECONNRESET}  # nobody will ever read it again


class TolerantStream:
    """A text stream whose writes never fail. Everything but `write` and `flush` is the stream's own.

    When the reader has gone, the stream's descriptor is opened on /dev/null, so that other writers
    (warnings, libraries) do not fail either. After other errors (a full disk) the next write tries again.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        with _tolerance(self._stream):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _tolerance(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _tolerance(contextlib.AbstractContextManager[None]):
    """Swallows the errors of a stream. A class, because a generator costs more than a short write."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, OSError):
            if error.errno in NO_READER:
                discard(self._stream)
            return True
        return isinstance(error, ValueError)  # a stream that was closed


def say(text: str) -> None:
    """Write a line to standard error, if anybody reads it."""
    stream = TolerantStream(sys.stderr)
    stream.write(text + "\n")
    stream.flush()


def discard(stream: TextIO) -> None:
    """Let everything that is written to the stream's descriptor, now and later, go to /dev/null."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def open_standard_streams() -> None:
    """Open what the parent has closed (`2>&-`) on /dev/null: the next file would get the descriptor, and what libraries
    write there. Characters that the locale cannot write are escaped.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_standard_streams() -> OSError | None:
    """Flush both, which Python would do at its end, with a message and a status of its own. Returns an error of stdout."""
    TolerantStream(sys.stderr).flush()
    try:
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        return error
    except ValueError:  # closed
        pass
    return None
