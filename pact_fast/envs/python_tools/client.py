"""The trainer's side of a worker: its process, the socket to it, and one request after the other."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import select
import signal
import socket
import threading
import time
from typing import Any

from pact_fast.envs.python_tools.fork_server import START_SECONDS, ForkServer, not_started
from pact_fast.envs.python_tools.worker.cgroup import remove_group
from pact_fast.envs.python_tools.worker.frames import LENGTH, frame
from pact_fast.envs.python_tools.worker.leftovers import remove_tree


class Worker:
    """A worker's process. One thread calls; any thread may disconnect or kill.

    Raises:
        PactError: The fork server does not start.
        OSError: It is closed.
    """

    def __init__(self, forks: ForkServer):
        self.protections: frozenset[str] = frozenset()
        self.disconnected = False
        self._kill_lock, self._killed = threading.RLock(), False
        self._ids = itertools.count()
        self._folder: str | None = None
        self._group: str | None = None
        self._socket, self._errors, self.pid, self._process = forks.fork()

    def wait_until_ready(self, *, probe: bool) -> None:
        """Wait for the worker to start. PactError if it does not. `probe`: make it answer a call."""
        try:
            hello = self._receive(time.monotonic() + START_SECONDS)
            self.protections = frozenset(hello["protections"])
            self._folder, self._group = hello["folder"], hello["group"]
            if not probe:
                return
            answer = self.call({"source": "", "function": "len", "arguments": "{}"}, START_SECONDS, START_SECONDS)
        except OSError:
            answer = ""
            self.disconnect()
            self._ends_within(5.0)
            os.set_blocking(self._errors, False)
            with contextlib.suppress(BlockingIOError):
                answer = os.read(self._errors, 1 << 16).decode("utf-8", "replace")
        if not answer.startswith("error: NameError"):  # the right answer to a call without a source
            self.kill()
            raise not_started(answer)

    def call(self, request: dict[str, Any], timeout: float, grace_period: float) -> str:
        """Send a request and return the observation.

        Args:
            request: `source`, `function`, `arguments`.
            timeout: Seconds that the tool has.
            grace_period: Seconds beyond them, until the worker counts as dead.

        Raises:
            OSError: The worker is dead or late, or its answer belongs to another request. It must be killed then.
        """
        number = next(self._ids)
        deadline = time.monotonic() + timeout + grace_period
        self._socket.settimeout(timeout + grace_period)
        self._socket.sendall(frame(request | {"id": number, "timeout": timeout}))
        answer = self._receive(deadline)
        if answer["id"] != number:
            raise ConnectionError("the worker answers another request")
        # a tokenizer cannot encode unpaired surrogates
        return str(answer["text"]).encode("utf-8", "replace").decode()

    def disconnect(self) -> None:
        """Have the worker end its call, clean up and exit."""
        self.disconnected = True
        with contextlib.suppress(OSError):  # it has exited already
            self._socket.shutdown(socket.SHUT_RDWR)

    def kill(self, grace_period: float = 0.0) -> None:
        """Disconnect, wait `grace_period` seconds for the worker to clean up, then kill it: the rest is its zygote's work.

        May be called by several threads, and more than once.
        """
        self.disconnect()
        with self._kill_lock:
            if self._killed:
                return
            self._killed = True
            if not self._ends_within(grace_period):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._process, signal.SIGKILL)
                self._ends_within(5.0)
            os.close(self._process)
            os.close(self._errors)
            self._socket.close()
        if self._folder is not None:  # both of its processes may have been killed
            remove_group(self._group)
            remove_tree(self._folder)

    def _ends_within(self, seconds: float) -> bool:
        """Whether the process ends."""
        poll = select.poll()  # `select` takes no descriptor above 1023
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(math.ceil(1000 * seconds)))

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
