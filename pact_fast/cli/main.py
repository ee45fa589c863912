"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import atexit
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from pact_fast.cli.commands import run_train
from pact_fast.cli.parser import make_parser
from pact_fast.distributed.exit import skip_teardown_exit
from pact_fast.errors import EngineError, PactError, ShutdownRequested
from pact_fast.plugins import no_exit
from pact_fast.streams import discard, flush_standard_streams, open_standard_streams, say
from pact_fast.text import one_line, visible


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status; a PactError is one line on standard error and status 2."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    rest = [item for item in rest if not item.startswith("--local_rank=")]  # added by the deepspeed launcher
    settings = [item for item in rest if "=" in item and not item.startswith("-")]  # settings may also follow options
    if settings != rest or (rest and not hasattr(arguments, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings += rest
    status = _status(arguments)
    skip_teardown_exit(status)
    return status


def entry() -> NoReturn:
    """`main` as the process: nothing that happens to its streams or at its end becomes a traceback."""
    open_standard_streams()
    logging.setLogRecordFactory(_VisibleRecord)
    try:
        status = main()
    except KeyboardInterrupt:  # again, while the first one is handled
        status = 130
    except SystemExit as stopped:  # of the argument parser
        status = stopped.code if isinstance(stopped.code, int) else 2
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    error = flush_standard_streams()
    if error is not None and status == 0:
        say(f"error: cannot write to standard output: {error.strerror}")
        status = 141 if isinstance(error, BrokenPipeError) else 2
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        atexit._run_exitfuncs()  # Python would wait first for threads whose results nobody reads: tools under way
        os._exit(status)
    sys.exit(status)


class _VisibleRecord(logging.LogRecord):
    """A log record without control characters: libraries log text of untrusted files."""

    def getMessage(self) -> str:
        return visible(super().getMessage())


def _status(arguments: argparse.Namespace) -> int:
    try:
        with no_exit("code that the command ran"):
            return arguments.run(arguments) or 0
    except ShutdownRequested as stopped:
        return stopped.status
    except PactError as error:
        # the end of an engine's log has several lines
        say(f"error: {visible(str(error)) if isinstance(error, EngineError) else one_line(str(error))}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; continue with resume=auto" if arguments.run is run_train else "interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has exited: `pact-fast recipes | head -1`
        discard(sys.stdout)
        return 141
    except OSError as error:  # of the system, which has no traceback to show
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        if error.filename is None:
            say(f"error: cannot write to standard output: {error.strerror}")
            discard(sys.stdout)
        else:
            say(one_line(f"error: {error.strerror}: {error.filename}"))
        return 2


if __name__ == "__main__":
    entry()
