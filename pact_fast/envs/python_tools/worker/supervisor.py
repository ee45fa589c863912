"""The supervisor: takes requests from the trainer, hands them to waiting tools, and answers within the time limit."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import sys
import tempfile
import time
from typing import Any

from .cgroup import remove_group
from .frames import LENGTH, frame
from .leftovers import end_descendants, remove_files_of, remove_tree
from .linux import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, libc_call
from .settings import Settings, unused_uid
from .tool import truncate
from .zygote import CALL, CAUSE, END, SystemProbe, start_zygote

MALFORMED_RESULT = "error: the tool wrote garbage to its result channel"
ZYGOTE_SECONDS = 1.0  # for the zygote to clean up after itself; less than the trainer grants both


class PeerGone(Exception):
    """The trainer or the zygote is gone."""


class Supervisor:
    """Serves the trainer's calls one after the other. Messages in: `id`, `source`, `function`, `arguments`, `timeout`.

    The first message out has `protections`, and `folder` and `group` to remove if the worker is killed; all others answer a
    request: its `id`, and the observation `text`.
    """

    def __init__(self, settings: Settings, trainer_process: int, probe: SystemProbe):
        self.settings = settings
        self.group: str | None = None
        self.trainer = socket.socket(fileno=0)
        self.trainer_process = trainer_process
        libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # adopts the zygote's processes if it is killed
        zygote, self.control = start_zygote(settings, probe)
        self.zygote = os.pidfd_open(zygote)
        libc_call("prctl", PR_SET_DUMPABLE, 0)  # a tool of the same user must not read this process's memory

    def serve(self) -> None:
        """Serve until the trainer is gone."""
        with contextlib.suppress(PeerGone, BrokenPipeError, ConnectionResetError):
            hello = self.control.recv(1 << 12)
            if not hello:
                raise PeerGone
            first = json.loads(hello) | {"folder": self.settings.folder}
            self.group = first["group"]
            self.trainer.sendall(frame(first))
            while True:
                self._serve_call()

    def clean_up(self) -> None:
        """End the zygote and all that it has started. The zygote does most of it, when it sees its socket close."""
        self.control.close()
        if not select.select([self.zygote], [], [], ZYGOTE_SECONDS)[0]:
            signal.pidfd_send_signal(self.zygote, signal.SIGKILL)
        end_descendants(self.settings.own_uid)
        remove_group(self.group)
        remove_tree(self.settings.folder)
        if self.settings.own_uid is not None:
            remove_files_of(self.settings.own_uid)

    def _serve_call(self) -> None:
        message, pipes, *_ = socket.recv_fds(self.control, 16, 3)
        if message != CALL:
            raise PeerGone
        try:
            request = self._receive()
            with contextlib.suppress(BrokenPipeError):  # the tool died while it waited; _wait_for_result reports it
                self._pass_on(request, pipes[0])
            text = self._wait_for_result(pipes[1], pipes[2], request["timeout"])
            self.control.send(END)  # first: the zygote prepares the next call while the trainer reads
            self.trainer.sendall(frame({"id": request["id"], "text": text}))
        finally:
            for end in pipes:
                os.close(end)

    def _pass_on(self, request: dict[str, Any], pipe: int) -> None:
        data = frame(request)
        while data:
            data = data[os.write(pipe, data) :]

    def _wait_for_result(self, result: int, output: int, timeout: float) -> str:
        """Read the tool's result and output until it is done, dead or late."""
        deadline = time.monotonic() + timeout
        frame_read, printed = bytearray(), bytearray()
        poll = select.poll()
        for source in (result, output, self.trainer_process, self.zygote):
            poll.register(source, select.POLLIN)
        poll.register(self.trainer, 0)  # no events: reports POLLHUP only
        while True:
            wait = deadline - time.monotonic()
            ready = {fd for fd, _ in poll.poll(math.ceil(wait * 1000))} if wait > 0 else set()
            if not ready:
                return f"error: the tool did not finish within {timeout:g} s"
            if ready & {self.trainer.fileno(), self.trainer_process, self.zygote}:
                raise PeerGone
            if output in ready:
                chunk = os.read(output, 1 << 16)
                printed += chunk[: max(0, 4 * self.settings.max_output + 4 - len(printed))]
                if not chunk:
                    poll.unregister(output)
            if result in ready:
                chunk = os.read(result, 1 << 16)
                frame_read += chunk
                if not chunk:
                    return f"error: the tool's process ended without a result{self._cause_of_death()}"
                if len(frame_read) >= LENGTH.size:
                    size = LENGTH.unpack_from(frame_read)[0]
                    if size > 12 * self.settings.max_output + 1000:  # a character is at most 12 bytes of JSON
                        return MALFORMED_RESULT
                    if len(frame_read) >= LENGTH.size + size:
                        return self._observation(bytes(frame_read[LENGTH.size : LENGTH.size + size]), printed, output)

    def _observation(self, data: bytes, printed: bytearray, output: int) -> str:
        """The text of a result frame; the printed text if the tool returned None."""
        limit = self.settings.max_output
        try:
            text = json.loads(data)
        except (ValueError, RecursionError):
            text = 0
        if text is None:
            os.set_blocking(output, False)
            with contextlib.suppress(BlockingIOError):
                while len(printed) <= 4 * limit and (chunk := os.read(output, 1 << 16)):
                    printed += chunk
            text = printed.decode("utf-8", "replace").strip() or "None"
        return truncate(text, limit) if isinstance(text, str) else MALFORMED_RESULT

    def _cause_of_death(self) -> str:
        """` (SIGKILL)` if the tool died of a signal that has a name, ` (signal 40)` if it has none; otherwise ""."""
        self.control.send(CAUSE)
        answer = self.control.recv(1)
        if not answer:
            raise PeerGone
        if answer[0] == 0:
            return ""
        names = {int(member): member.name for member in signal.Signals}
        return f" ({names.get(answer[0], f'signal {answer[0]}')})"

    def _receive(self) -> dict[str, Any]:
        """The next request."""
        return json.loads(self._read(LENGTH.unpack(self._read(LENGTH.size))[0]))

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            # watch the trainer's process, too: a process that it forked may hold its end of the socket open
            ready, _, _ = select.select([self.trainer.fileno(), self.trainer_process, self.zygote], [], [])
            if self.trainer.fileno() not in ready:
                raise PeerGone
            chunk = self.trainer.recv(min(size - len(data), 1 << 16))
            if not chunk:
                raise PeerGone
            data += chunk
        return bytes(data)


def main(argv: list[str], trainer_process: int, probe: SystemProbe) -> None:
    """Serve the trainer on descriptor 0.

    Args:
        argv: Address space in MiB, characters of an observation, the kind of sandbox.
        trainer_process: A descriptor of the trainer's process (pidfd).
        probe: What the system allows.
    """
    folder = tempfile.mkdtemp(prefix="pact-tool-")
    os.chmod(folder, 0o711)  # a tool of another user works in a folder inside
    uid = unused_uid(os.getpid()) if os.geteuid() == 0 else None
    supervisor = None
    try:
        settings = Settings(int(argv[0]) << 20, int(argv[1]), argv[2], folder, uid)
        supervisor = Supervisor(settings, trainer_process, probe)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        supervisor.serve()
    finally:
        if supervisor:
            supervisor.clean_up()
        remove_tree(folder)
