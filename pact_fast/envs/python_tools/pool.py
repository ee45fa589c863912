"""A pool of sandbox workers that run untrusted Python functions, a few milliseconds per call."""

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
GRACE_SECONDS = 5.0  # after a call's own limit, before its worker counts as dead
WORKER_FAILED = "error: the tool broke its worker process"


class SandboxPool:
    """Warm workers, each of which runs one call at a time. Thread-safe; must not be used in a forked child.

        with SandboxPool(workers=4) as pool:
            pool.call("def add(a, b): return a + b", "add", {"a": 1, "b": 2})     # "3"

    Every call gets a fresh process, forked from a worker that has the common standard modules loaded. Other standard
    modules can be imported, site-packages cannot. The process starts in an empty folder that is removed after the call,
    without environment variables, open files or input, with limits on CPU time, memory, file size, open files and
    processes. `protections` names the further ones that the system allowed:

    network    no network at all
    files      all other files are read-only, /tmp and /proc are empty
    processes  a PID namespace: nothing outside can be seen or signalled; processes started by the call end with it
    identity   an unused user id (only if the trainer is root)

    It contains accidents and clumsy tools and is not a security boundary; worker.py lists what is covered and what is
    not. Run code that you expect to be hostile in a virtual machine.

    Args:
        workers: Calls that may run at the same time. A worker starts when it is first needed.
        timeout: Seconds of wall-clock time per call; CPU time is limited to about the same.
        memory_mb: Address space of a process of a call, MiB.
        max_output: Characters of an observation; a longer one is truncated, with a note.

    Raises:
        PactError: An argument is out of range, or workers cannot start (not Linux, or a kernel older than 5.3).
    """

    def __init__(self, workers: int = 4, *, timeout: float = 10.0, memory_mb: int = 1024, max_output: int = 65536):
        if workers < 1 or timeout <= 0 or memory_mb < 64 or max_output < 1:
            raise PactError("the tool pool needs workers >= 1, timeout > 0, memory_mb >= 64 and max_output >= 1")
        self.timeout, self._memory_mb, self._max_output = timeout, memory_mb, max_output
        self._running: set[_Worker] = set()
        self._closed = False
        self._finalizer = weakref.finalize(self, _stop, self._running, os.getpid())  # also at exit
        # a free slot: a warm worker, or None for one not yet started; last in, first out, so that warm ones come first
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers - 1):
            self._slots.put(None)
        first = self._start()
        self._slots.put(first)
        self.protections: frozenset[str] = first.protections

    def call(self, source: str, function: str, arguments: dict[str, Any], timeout: float | None = None) -> str:
        """Execute `source`, call `function(**arguments)` and return the observation. Waits while all workers are busy.

        A dict or list is returned as JSON, anything else as str, None as the printed text. A tool that fails in any way
        gives a text that starts with `error: `.

        Args:
            source: Python source that defines the function.
            function: Its name.
            arguments: Keyword arguments, JSON data.
            timeout: Seconds; None: the pool's.

        Raises:
            PactError: The pool is closed.
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
        except OSError:  # includes a timeout and the death of the worker
            if worker:
                self._running.discard(worker)
                worker.kill()
            worker = None
            return WORKER_FAILED
        finally:
            self._slots.put(worker)

    def close(self) -> None:
        """Stop all workers. Running calls end with an error observation."""
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
    """A server process (worker.py) and the socket to it."""

    def __init__(self, memory_mb: int, max_output: int):
        if sys.platform != "linux":
            raise PactError(f"python_tools needs Linux to limit the tools' processes, and this is {sys.platform}")
        self._socket, theirs = socket.socketpair()
        # -P -s -S: only the standard library can be imported. PYTHONHASHSEED makes strings hash the same in every worker,
        # so that a tool that iterates over a set gives the same answer each time; -I would ignore it.
        environment = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(WORKER), str(memory_mb), str(max_output)],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,  # an interrupt from the terminal goes to the trainer only
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
        if not answer.startswith("error: NameError"):  # the right answer to a call without a source
            self.disconnect()
            self.kill(patience=5.0)
            line = answer.splitlines()[-1] if answer else "no answer"
            raise PactError(f"tool workers do not start here: {line}; python_tools needs Linux 5.3 or newer")

    def call(self, request: dict[str, Any], seconds: float) -> str:
        """Send a request and return the observation. OSError if the worker is dead or late."""
        deadline = time.monotonic() + seconds
        data = json.dumps(request).encode()
        self._socket.settimeout(seconds)
        self._socket.sendall(LENGTH.pack(len(data)) + data)
        # a tokenizer cannot encode unpaired surrogates
        return str(self._receive(deadline)["text"]).encode("utf-8", "replace").decode()

    def disconnect(self) -> None:
        """Ask the server to exit, even during a call."""
        with contextlib.suppress(OSError):  # it has exited already
            self._socket.shutdown(socket.SHUT_RDWR)

    def kill(self, patience: float = 0.0) -> None:
        """Wait `patience` seconds for the server to exit, then kill it. Its call dies with it."""
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
                raise ConnectionError("the worker has exited")
            data += chunk
        return bytes(data)


def _stop(workers: set[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # in a forked child, which only drops its copy of the pool
        return
    stopping = list(workers)
    workers.clear()
    for worker in stopping:
        worker.disconnect()
    for worker in stopping:
        worker.kill(patience=5.0)
