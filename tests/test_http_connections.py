"""Connections to a vLLM server: their traffic, reuse, and waiting for a free one. No vLLM is needed."""

import asyncio
import contextlib
import errno
import json
import socket
import threading
import time
from concurrent.futures import Future

import pytest

from pact_fast.errors import EngineDied, EngineError, EngineTimeout, PactError
from pact_fast.rollout.vllm import http_client, http_pool
from pact_fast.rollout.vllm.http_client import HttpClient
from pact_fast.rollout.vllm.http_connection import Exchange

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Server:
    """Answers each request of a connection with the bytes that `answer` returns for its path, as fast as it can."""

    def __init__(self, answer):
        self.answer, self.requests, self.connections = answer, [], 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/base"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as lines:
            while line := lines.readline():
                headers = {}
                while header := lines.readline().strip():
                    name, _, value = header.decode().partition(": ")
                    headers[name.lower()] = value
                body = lines.read(int(headers["content-length"]))
                path = line.split()[1].decode()
                self.requests.append((line.decode().strip(), headers, body))
                try:
                    for part in self.answer(path.removeprefix("/base")):
                        connection.sendall(part)
                        time.sleep(0.005)
                except OSError:
                    return
                if path.endswith("/close"):
                    return

    def close(self):
        with contextlib.suppress(OSError):  # closed already
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()


@pytest.fixture
def served():
    """A server with an answer, and a client of it."""
    made = []

    def make(answer):
        server = Server(answer if callable(answer) else lambda path: answer)
        client = HttpClient("the server", server.url, None)
        made.extend([client, server])
        return server, client

    yield make
    for one in made:
        one.close()


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Turn(Exchange):
    def __init__(self, path="/turn", body=b"[1]"):
        super().__init__("POST", path, 1 << 20, turn=True)
        self.text, self.outcome = body, Future()

    def body(self):
        return self.text

    def finish(self, outcome):
        self.outcome.set_result(outcome)


def ask(client, path="/x"):
    return client.request("POST", path, 10.0, json={"a": [1]})


def test_a_request_is_what_http_says_it_is(served, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server, client = served([OK])
    answer = ask(client)
    assert (answer.path, answer.status, answer.kind, answer.content) == ("/x", 200, "application/json", b"{}")
    line, headers, body = server.requests[0]
    assert line == "POST /base/x HTTP/1.1" and json.loads(body) == {"a": [1]}
    assert headers["host"] == server.url.split("/")[2] and headers["authorization"] == "Bearer secret"
    assert headers["accept-encoding"] == "identity" and headers["content-type"] == "application/json"


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
BODIES = {
    "in chunks": [CHUNKED + b"3\r\n{}", b" \r\n0\r\n\r\n"],
    "byte by byte": [bytes([byte]) for byte in OK.replace(b"2\r\n\r\n{}", b"3\r\n\r\n{} ")],
    "after an interim answer": [b"HTTP/1.1 100 Continue\r\n\r\n", OK.replace(b"2\r\n\r\n{}", b"3\r\n\r\n{} ")],
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_arrive_whole_and_the_connection_is_used_again(served, name):
    server, client = served(BODIES[name])
    assert [ask(client).content for _ in range(3)] == [b"{} "] * 3
    assert server.connections == 1


def test_a_body_may_end_with_its_connection(served):
    server, client = served([b"HTTP/1.1 200 OK\r\n\r\n{}", b" "])
    assert ask(client, "/close").content == b"{} " and ask(client, "/close").content == b"{} "
    assert server.connections == 2


NOT_REUSED = {
    "the server closes": [OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")],
    "two answers to one request": [OK + OK.replace(b"{}", b"[]")],
    "an answer nobody asked for": [OK, OK.replace(b"{}", b"[]")],
}


@pytest.mark.parametrize("name", NOT_REUSED)
def test_an_answer_never_reaches_another_request(served, name, monkeypatch):
    monkeypatch.setattr(http_pool, "KEEP_ALIVE", 60.0)  # so that nothing else closes it
    server, client = served(NOT_REUSED[name])
    for _ in range(3):
        assert ask(client).content == b"{}"
        wait_for(lambda: not any(connection.usable for connection in client._pool._idle))
    assert server.connections == 3


BROKEN = {
    "no HTTP": [b"SSH-2.0-OpenSSH\r\n"],
    "cut in the headers": [b"HTTP/1.1 200 OK\r\ncontent"],
    "cut in a chunk": [CHUNKED + b"5\r\nab"],
    "two lengths": [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}"],
    "another protocol": [b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"],
    "nothing": [],
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_answer_is_a_dead_engine(served, name):
    _, client = served(BROKEN[name])
    with pytest.raises(EngineDied, match=r"^the server: /close: "):
        ask(client, "/close")


def test_endless_headers_are_refused_early(served):
    _, client = served(
        lambda path: (b"HTTP/1.1 200 OK\r\n" if n == 0 else b"x: " + b"y" * 8000 + b"\r\n" for n in range(99))
    )
    with pytest.raises(EngineError, match="more than 64 KiB of headers") as caught:
        ask(client)
    assert type(caught.value) is EngineError


def test_a_server_that_is_not_there_is_dead_and_a_late_one_late(served):
    server, client = served([OK[:-2], b""])
    with pytest.raises(EngineTimeout, match=r"within 0\.1 s"):
        client.request("GET", "/x", 0.1)
    server.close()
    with pytest.raises(EngineDied):
        for _ in range(2):  # the listener may have accepted one more
            client.request("GET", "/close", 0.5)


def test_turns_beyond_the_limit_wait_and_other_requests_do_not(served, monkeypatch):
    monkeypatch.setattr(http_client, "open_request_limit", lambda: 2)
    go = threading.Event()

    def answer(path):
        if path == "/turn":
            go.wait(10)
        return [OK]

    server, client = served(answer)
    turns = [Turn() for _ in range(6)]
    for turn in turns:
        client.start(turn)
    assert ask(client, "/rpc").content == b"{}"  # with all slots taken
    client.cancel(turns[4])  # it waits still
    client.cancel(turns[0])  # it is on a connection
    time.sleep(0.05)
    assert [line for line, *_ in server.requests].count("POST /base/turn HTTP/1.1") <= 3
    go.set()
    assert all(turns[n].outcome.result(10).content == b"{}" for n in (1, 2, 3, 5))
    assert not turns[0].outcome.done() and not turns[4].outcome.done()
    assert [body for _, _, body in server.requests].count(
        b"[1]"
    ) == 5  # all but the one that was cancelled as it waited


def forty_turns_are_answered(client):
    turns = [Turn() for _ in range(40)]
    for turn in turns:
        client.start(turn)
    return all(turn.outcome.result(10).content == b"{}" for turn in turns)


def test_few_connections_open_at_a_time(served, monkeypatch):
    monkeypatch.setattr(http_pool, "MAX_OPENING", 4)
    connect, opening, most = http_pool.ConnectionPool._connect, [], []

    async def slow(pool):
        opening.append(pool)
        most.append(len(opening))
        await asyncio.sleep(0.02)
        opening.pop()
        return await connect(pool)

    monkeypatch.setattr(http_pool.ConnectionPool, "_connect", slow)
    _, client = served([OK])
    assert forty_turns_are_answered(client) and max(most) == 4


def test_a_limit_of_ours_makes_turns_wait_and_is_no_dead_server(served, monkeypatch):
    """At most 3 connections can be opened, in spite of the limit."""
    connect, opened = http_pool.ConnectionPool._connect, []

    async def scarce(pool):
        if len(opened) == 3:
            raise OSError(errno.EMFILE, "Too many open files")
        opened.append(pool)
        return await connect(pool)

    monkeypatch.setattr(http_pool.ConnectionPool, "_connect", scarce)
    server, client = served([OK])
    assert forty_turns_are_answered(client) and server.connections == 3
    held = [Turn("/never") for _ in range(3)]
    server.answer = lambda path: [OK] if path == "/x" else (time.sleep(10) or [])
    for turn in held:
        client.start(turn)
    time.sleep(0.05)
    with pytest.raises(EngineError, match="ulimit -n") as caught:  # nothing of its own to wait for
        ask(client)
    assert type(caught.value) is EngineError


def test_a_defect_in_one_turn_ends_that_turn_only(served):
    _, client = served([OK])
    broken, good = Turn(), Turn()
    broken.text = None
    client.start(broken)
    client.start(good)
    assert isinstance(broken.outcome.result(10), EngineError) and good.outcome.result(10).content == b"{}"


def test_idle_connections_are_closed_before_the_server_does(served, monkeypatch):
    monkeypatch.setattr(http_pool, "KEEP_ALIVE", 0.1)
    server, client = served([OK])
    ask(client)
    wait_for(lambda: not client._pool._connections)
    assert not client._pool._connections and not client._pool._idle
    ask(client)
    assert server.connections == 2


def test_the_loop_is_woken_once_for_many_turns(served, monkeypatch):
    _, client = served([OK])
    ask(client)
    hold, woken = threading.Event(), []
    client._loop.call_soon_threadsafe(hold.wait, 10)
    wake = client._loop.call_soon_threadsafe
    monkeypatch.setattr(client._loop, "call_soon_threadsafe", lambda *call: woken.append(call) or wake(*call))
    turns = [Turn() for _ in range(50)]
    for turn in turns:
        client.start(turn)
    hold.set()
    assert all(turn.outcome.result(10).content == b"{}" for turn in turns) and len(woken) == 1
    monkeypatch.undo()


@pytest.mark.parametrize(
    "url", ["ftp://host", "http://", "host:8000", "http://host:port", "http://host/a b", "http://[::1"]
)
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(PactError, match="URL"):
        HttpClient("the server", url, None)


def test_a_key_cannot_add_headers(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a\r\nX: y")
    with pytest.raises(PactError, match="VLLM_API_KEY"):
        HttpClient("the server", "http://host", None)
