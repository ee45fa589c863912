"""The trainer's side of a worker: its process, the socket to it, and one request after the other."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pact_fast.envs.python_tools.worker.cgroup import remove_group
from pact_fast.envs.python_tools.worker.frames import LENGTH, frame
from pact_fast.envs.python_tools.worker.leftovers import remove_tree
from pact_fast.errors import PactError

WORKER = Path(__file__).with_name("worker")
START_SECONDS = 60.0  # a busy machine may take long to start Python


class Worker:
    """A worker's process. One thread calls; any thread may disconnect or kill.

    Args:
        memory_mb: Address space of a process of a call, MiB.
        max_output: Characters of an observation.
        sandbox: "namespaces" or "bubblewrap".
    """

    def __init__(self, memory_mb: int, max_output: int, sandbox: str):
        if sys.platform != "linux":
            raise PactError(f"python_tools needs Linux to limit the tools' processes, and this is {sys.platform}")
        self.protections: frozenset[str] = frozenset()
        self.disconnected = False
        self._ids = itertools.count()
        self._folder: str | None = None
        self._group: str | None = None
        self._socket, theirs = socket.socketpair()
        # -P -s -S: only the standard library can be imported. PYTHONHASHSEED makes strings hash the same in every worker,
        # so that a tool that iterates over a set gives the same answer each time; -I would ignore it.
        environment = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        options = [str(memory_mb), str(max_output), sandbox]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", str(WORKER), "supervisor", *options],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                cwd="/",
                start_new_session=True,  # an interrupt from the terminal goes to the trainer only
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait for the worker to start. PactError if it does not."""
        try:
            hello = self._receive(time.monotonic() + START_SECONDS)
            self.protections = frozenset(hello["protections"])
            self._folder, self._group = hello["folder"], hello["group"]
            answer = self.call({"source": "", "function": "len", "arguments": "{}"}, START_SECONDS, START_SECONDS)
        except OSError:
            self.disconnect()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            self._process.kill()
            answer = self._process.communicate()[1].decode("utf-8", "replace").strip()
        if not answer.startswith("error: NameError"):  # the right answer to a call without a source
            self.kill()
            line = answer.splitlines()[-1] if answer else "no answer"
            if line.startswith("env.args"):
                raise PactError(line)
            raise PactError(f"tool workers do not start here: {line}; python_tools needs Linux 5.3 or newer")

    def call(self, request: dict[str, Any], timeout: float, patience: float) -> str:
        """Send a request and return the observation.

        Args:
            request: `source`, `function`, `arguments`.
            timeout: Seconds that the tool has.
            patience: Seconds beyond them, until the worker counts as dead.

        Raises:
            OSError: The worker is dead or late, or its answer belongs to another request. It must be killed then.
        """
        number = next(self._ids)
        deadline = time.monotonic() + timeout + patience
        self._socket.settimeout(timeout + patience)
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

    def kill(self, patience: float = 0.0) -> None:
        """Disconnect, wait `patience` seconds for the worker to clean up, then kill it: the rest is its zygote's work."""
        self.disconnect()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr
        self._process.stderr.close()
        self._socket.close()
        if self._folder is not None:  # both of its processes may have been killed
            remove_group(self._group)
            remove_tree(self._folder)

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
