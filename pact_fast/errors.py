"""Errors that a user can fix, and the exception that ends a run on request."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class PactError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, and how to fix it.

    The command line prints it without a traceback and exits with status 2.
    """


class DataError(PactError):
    """A data row that cannot be used. The message names the file, the line (from 1) and the field."""

    def __init__(self, problem: str, *, file: str = "", line: int | None = None, field: str = ""):
        self.problem, self.file, self.line, self.field = problem, file, line, field
        where = file + (f":{line}" if line is not None else "")
        parts = [part for part in (where, f"field '{field}'" if field else "") if part]
        super().__init__(": ".join([*parts, problem]))


class EngineError(PactError):
    """The inference engine failed; `engine` says which one."""

    def __init__(self, engine: str, problem: str):
        self.engine, self.problem = engine, problem
        super().__init__(f"{engine}: {problem}")


class EngineDied(EngineError):
    """The process of the engine has exited, or its address does not answer."""


class EngineTimeout(EngineError):
    """The engine is running but has not answered within the deadline."""


class ShutdownRequested(SystemExit):
    """SIGTERM or SIGHUP came while there was nothing to finish. `status` is 128 + its number, as shells report it."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        self.status = 128 + number
        super().__init__(self.status)


def error_line(error: BaseException, limit: int = 200) -> str:
    """The text of an exception on one line, cut to `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# Raised through third-party code, not by it
PASSED_ON = (PactError, ShutdownRequested, KeyboardInterrupt, GeneratorExit)


@contextmanager
def foreign_errors(problem: str, cure: str) -> Iterator[None]:
    """Turn any exception of third-party code on an untrusted file into a PactError `problem: reason; cure`, one line.

    There is no list of expected exceptions: libraries raise what their own code happens to run into, and the parts that
    are written in Rust also raise objects that are not an Exception.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except BaseException as error:
        reason = error_line(error, 300)
        if not isinstance(error, OSError | ValueError) or not reason:
            reason = f"{type(error).__name__}: {reason}".rstrip(": ")
        raise PactError(f"{problem}: {reason}; {cure}") from error
