"""Runs untrusted Python functions in limited processes, a few milliseconds each."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from pact_fast.envs.python_tools.worker import LENGTH
from pact_fast.errors import PactError

WORKER = Path(__file__).with_name("worker.py")
START_SECONDS = 60.0  # a busy machine may take long to start Python
GRACE_SECONDS = 5.0  # beyond a call's own limit, before its worker is taken for dead
BROKEN = "error: the tool broke its worker process"


class SandboxPool:
    """Warm workers that run one call each at a time. Thread-safe; not to be used in a forked child.

        with SandboxPool(workers=4) as pool:
            pool.call("def add(a, b): return a + b", "add", {"a": 1, "b": 2})     # "3"

    workers     calls that may run at the same time; a worker starts when it is first needed
    timeout     seconds per call, wall clock; CPU time is limited to about the same
    memory_mb   address space of a call's process, MiB
    max_output  characters of an observation; a longer one is cut, with a note

    Every call gets a fresh process, forked from a worker that has the common standard modules loaded; other standard
    modules can be imported, site-packages cannot. It starts in an empty folder that vanishes with it, with no
    environment, no open files, no input, and limits on CPU time, memory, file size, open files and processes.
    `protections` names what else the system allowed:

    network    no network at all
    files      all else is read-only, /tmp and /proc are empty
    processes  its own process space: it sees and signals nothing outside, and what it starts ends right after the call
    identity   it runs as a user id that nobody has (only when the trainer is root)

    This contains accidents and clumsy tools. It is not a security boundary: a tool can read every file that its user
    may read (the trainer's own user, unless `identity` holds) and put it into an observation, can talk to local
    services through socket files, can probe the kernel and the timing of its neighbours. Run code that you expect to be
    hostile in a virtual machine. Without `processes` and `identity`, a tool can even kill the trainer.

    Raises PactError where workers cannot start (not Linux, or a kernel older than 5.3).
    """

    def __init__(self, workers: int = 4, *, timeout: float = 10.0, memory_mb: int = 1024, max_output: int = 65536):
        if workers < 1 or timeout <= 0 or memory_mb < 64 or max_output < 1:
            raise PactError("the tool pool needs workers >= 1, timeout > 0, memory_mb >= 64 and max_output >= 1")
        self.timeout, self._memory_mb, self._max_output = timeout, memory_mb, max_output
        self._running: set[_Worker] = set()
        self._closed = False
        self._finalizer = weakref.finalize(self, _stop, self._running, os.getpid())  # also at exit
        self._slots: queue.LifoQueue[_Worker | None] = (
            queue.LifoQueue()
        )  # last in, first out: the warm ones are used first
        for _ in range(workers - 1):
            self._slots.put(None)
        first = self._start()
        self._slots.put(first)
        self.protections: frozenset[str] = first.protections

    def call(self, source: str, function: str, arguments: dict[str, Any], timeout: float | None = None) -> str:
        """Run `source`, call `function(**arguments)`; the observation.

        A dict or list comes as JSON, anything else as str; None as what was printed, if anything was. Whatever the tool
        does wrong is an observation that starts with `error: `. Waits while all workers are busy. PactError if the pool
        is closed.
        """
        timeout = self.timeout if timeout is None else timeout
        try:
            encoded = json.dumps(arguments)
        except (TypeError, ValueError, RecursionError) as error:
            return f"error: the arguments are not JSON: {error}"
        request = {"source": source, "function": function, "arguments": encoded, "timeout": timeout}
        worker = self._slots.get()
        try:
            if self._closed:
                raise PactError("the tool pool is closed; make a new one")
            worker = worker or self._start()
            return worker.call(request, timeout + GRACE_SECONDS)
        except OSError:  # also a timeout, or the worker's end
            if worker:
                self._running.discard(worker)
                worker.kill()
            worker = None
            return BROKEN
        finally:
            self._slots.put(worker)

    def close(self) -> None:
        """Stop all workers. Calls that still run end with an error observation."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        worker = _Worker(self._memory_mb, self._max_output)
        self._running.add(worker)
        return worker


class _Worker:
    """One server process and the socket to it."""

    def __init__(self, memory_mb: int, max_output: int):
        if sys.platform != "linux":
            raise PactError(f"python_tools needs Linux to limit the tools' processes, and this is {sys.platform}")
        self._socket, theirs = socket.socketpair()
        # -P -s -S: nothing but the standard library can be imported. Strings hash the same in every worker, so a tool
        # that walks over a set answers the same each time; -I would ignore that setting, and isolates no better than an
        # empty environment.
        environment = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(WORKER), str(memory_mb), str(max_output)],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,  # an interrupt from the terminal is the trainer's to handle
        )
        theirs.close()
        try:
            self.protections = frozenset(self._receive(time.monotonic() + START_SECONDS)["protections"])
            answer = self.call(
                {"source": "", "function": "len", "arguments": "{}", "timeout": START_SECONDS}, START_SECONDS
            )
        except OSError:
            self._process.kill()
            answer = self._process.communicate()[1].decode("utf-8", "replace").strip()
        if not answer.startswith("error: NameError"):  # what a call without a source must bring
            self.hang_up()
            self.kill(patience=5.0)
            line = answer.splitlines()[-1] if answer else "no answer"
            raise PactError(f"tool workers do not start here: {line}; python_tools needs Linux 5.3 or newer")

    def call(self, request: dict[str, Any], seconds: float) -> str:
        """OSError if the worker is dead or late."""
        deadline = time.monotonic() + seconds
        data = json.dumps(request).encode()
        self._socket.settimeout(seconds)
        self._socket.sendall(LENGTH.pack(len(data)) + data)
        # lone surrogates are no text for a tokenizer
        return str(self._receive(deadline)["text"]).encode("utf-8", "replace").decode()

    def hang_up(self) -> None:
        """Ask the server to end, in the middle of a call too."""
        with contextlib.suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_RDWR)

    def kill(self, patience: float = 0.0) -> None:
        """The end of the server is the end of its call."""
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr
        self._process.stderr.close()
        self._socket.close()

    def _receive(self, deadline: float) -> dict[str, Any]:
        size = LENGTH.unpack(self._read(LENGTH.size, deadline))[0]
        return json.loads(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            chunk = self._socket.recv(min(size - len(data), 1 << 16))
            if not chunk:
                raise ConnectionError("the worker is gone")
            data += chunk
        return bytes(data)


def _stop(workers: set[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a forked child drops its copy of the pool
        return
    stopping = list(workers)
    workers.clear()
    for worker in stopping:
        worker.hang_up()
    for worker in stopping:
        worker.kill(patience=5.0)
