"""A server of the OpenAI protocol over HTTP with answers given by the test."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pact_fast.llm import LLMConfig

Body = dict[str, Any]
platform.processor()  # starts a process, once; openai wants it for a header


@dataclass
class Reply:
    """Response of the server: status, headers, and chunks of the body, with `pause` seconds before each."""

    chunks: list[bytes] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    reset: bool = False  # hang up with RST instead


def said(text: str | None, *, finish: str = "stop", prompt: int = 10, completion: int = 5, **message: Any) -> Reply:
    """An ordinary answer."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return Reply([json.dumps(body).encode()])


def refused(status: int, text: str = "no", **headers: str) -> Reply:
    return Reply([json.dumps({"error": {"message": text}}).encode()], status, headers)


class LLMServer(ThreadingHTTPServer):
    """`answer` makes the reply to each request; `bodies` and `keys` record the requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[Body], Reply]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.bodies, self.keys = answer, [], []  # type: ignore[var-annotated]
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def config(self, **settings: Any) -> LLMConfig:
        return LLMConfig(**{"model": "m", "base_url": self.url, **settings})

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client has hung up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LLMServer

    def do_GET(self) -> None:
        self._send(Reply([json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()]))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers.get("authorization"))
            self.server.running += 1
            self.server.most_running = max(self.server.running, self.server.most_running)
        try:
            reply = self.server.answer(body)
        finally:  # before the client can have the answer, and ask again
            with self.server.lock:
                self.server.running -= 1
        self._send(reply)

    def _send(self, reply: Reply) -> None:
        self.close_connection = True
        if reply.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        self.send_response(reply.status)
        for name, value in {"content-type": "application/json", "connection": "close", **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in reply.chunks:
            time.sleep(reply.pause)
            self.wfile.write(chunk)
            self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def llm_server(answer: Callable[[Body], Reply]) -> Iterator[LLMServer]:
    with LLMServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def in_turn(*replies: Reply) -> Callable[[Body], Reply]:
    """The replies one after the other, the last one for ever."""
    left, lock = list(replies), threading.Lock()

    def answer(_: Body) -> Reply:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return answer


@contextlib.contextmanager
def forks_of(function: Callable[..., object]) -> Iterator[Callable[..., int]]:
    """A function that forks a process which calls `function` with its arguments, and returns the process id.

    The processes are forked from one that has imported openai, which takes seconds. They write nothing to the terminal.
    """
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=_fork, args=(theirs, function), daemon=True)
    process.start()
    assert pipe.recv() == "ready"

    def fork(*arguments: Any) -> int:
        pipe.send(arguments)
        return pipe.recv()

    try:
        yield fork
    finally:
        pipe.send(None)
        process.join()


def _fork(pipe: Any, function: Callable[..., object]) -> None:
    import openai.resources.chat  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    pipe.send("ready")
    for arguments in iter(pipe.recv, None):
        pid = os.fork()
        if pid == 0:
            function(*arguments)
            os._exit(0)
        pipe.send(pid)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
