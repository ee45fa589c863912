"""The trainer's side of the fork server, from which all workers of a pool are forked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from pact_fast.envs.python_tools.worker.frames import PID, START
from pact_fast.errors import PactError

WORKER = Path(__file__).with_name("worker")
START_SECONDS = 60.0  # a busy machine may take long to start Python


class Forked(NamedTuple):
    """A worker's process: the socket to it, its standard error, its pid, and a descriptor of it (pidfd)."""

    socket: socket.socket
    errors: int
    pid: int
    process: int


class ForkServer:
    """Starts when it is first needed, and again after `discard`. Thread-safe.

    Args:
        memory_mb: Address space of a process of a call, MiB.
        max_output: Characters of an observation.
        sandbox: "namespaces" or "bubblewrap".
    """

    def __init__(self, memory_mb: int, max_output: int, sandbox: str):
        if sys.platform != "linux":
            raise PactError(f"python_tools needs Linux to limit the tools' processes, and this is {sys.platform}")
        self._options = [str(memory_mb), str(max_output), sandbox]
        self._lock = threading.RLock()  # a signal handler may close the pool
        self._closed = False
        self._server: _Server | None = None

    def fork(self) -> Forked:
        """A new worker's process.

        Raises:
            PactError: The server does not start.
            OSError: It is closed.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise ConnectionError("the fork server is closed")
                fresh = self._server is None
                server = self._server = self._server or _Server(self._options)
            try:
                return server.fork()
            except (ConnectionError, TimeoutError):
                discarded = server.discarded
                self.discard(server)
                if fresh and not discarded:
                    raise not_started(server.said) from None

    def discard(self, server: _Server | None = None) -> None:
        """Start another server for the next worker: this one (None: whichever runs) has failed or is in doubt."""
        with self._lock:
            if server is None or server is self._server:
                server, self._server = self._server, None
            if server:
                server.kill()

    def close(self) -> None:
        """Kill the server, for good. Stop its workers before, or they become orphans."""
        self._closed = True
        self.discard()


class _Server:
    """The process, and the socket to it.

    discarded  it was killed
    said       its standard error, after it was killed
    """

    def __init__(self, options: list[str]):
        self.discarded, self.said = False, ""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -P -s -S: only the standard library can be imported. PYTHONHASHSEED makes strings hash the same in every worker,
        # so that a tool that iterates over a set gives the same answer each time; -I would ignore it.
        environment = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(WORKER), "server", *options],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                cwd="/",
                start_new_session=True,  # an interrupt from the terminal goes to the trainer only
            )

    def fork(self) -> Forked:
        """ConnectionError or TimeoutError if the server is dead or late."""
        ours, theirs = socket.socketpair()
        errors, their_errors = os.pipe()
        try:
            try:
                socket.send_fds(self._socket, [START], [theirs.fileno(), their_errors])
            finally:
                theirs.close()
                os.close(their_errors)
            ours.settimeout(START_SECONDS)
            message, processes, *_ = socket.recv_fds(ours, PID.size, 1)
            if len(message) != PID.size or not processes:
                raise ConnectionError("the fork server has exited")
        except BaseException as error:
            ours.close()
            os.close(errors)
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise ConnectionError(str(error)) from None
            raise
        return Forked(ours, errors, PID.unpack(message)[0], processes[0])

    def kill(self) -> None:
        """More than once does no harm."""
        if self.discarded:
            return
        self.discarded = True
        self._process.kill()
        self._process.wait()
        assert self._process.stderr
        with self._process.stderr as stream:
            self.said = stream.read().decode("utf-8", "replace")
        self._socket.close()


def not_started(said: str) -> PactError:
    """The error for a worker or a server that does not start. `said`: its output."""
    lines = said.strip().splitlines()
    if lines and lines[-1].startswith("env.args"):
        return PactError(lines[-1])
    last = lines[-1] if lines else "no answer"
    return PactError(f"tool workers do not start here: {last}; python_tools needs Linux 5.3 or newer")
