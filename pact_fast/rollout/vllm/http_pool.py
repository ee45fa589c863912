"""Connections to one server: as many as there are requests, up to a limit of open turns; the others wait."""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import ssl
import urllib.parse
from collections import deque

from pact_fast.errors import EngineDied, EngineError, PactError
from pact_fast.rollout.vllm.http_connection import READ_BYTES, Connection, Exchange

CONNECT_TIMEOUT = 60.0  # seconds; a busy server takes some of them
MAX_OPENING = (
    256  # connections that open at a time for turns; more than a server's backlog would wait for repeated packets
)
KEEP_ALIVE = 2.0  # seconds that an idle connection is kept; vLLM closes it after 5, perhaps while we send
OUR_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)  # of files of the process, of the system, of ports


class ConnectionPool:
    """Sends exchanges. All methods but the constructor are called in the thread of one event loop.

    Args:
        engine: Name of the server, for messages.
        base_url: URL of the server; over a Unix socket only its path matters.
        uds: Path of a Unix socket; None: TCP.
        limit: Turns that may be open at a time. It falls when the system refuses to open a connection for a turn: a limit
            of this process or machine makes turns wait, and is never taken for a dead server.

    Raises:
        PactError: The URL, or VLLM_API_KEY, cannot be sent.
    """

    def __init__(self, engine: str, base_url: str, uds: str | None, limit: int):
        self._engine, self._uds, self._limit = engine, uds, limit
        self._host, self._port, self._tls, self._target, self._headers = _read_url(base_url)
        self._heads: dict[tuple[str, str], bytes] = {}  # by method and path
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._address: str | None = None  # of the host, once a connection has found it
        self._turns = 0  # under way
        self._waiting: deque[Exchange] = deque()
        self._idle: deque[Connection] = deque()  # the longest idle ones first
        self._connections: set[Connection] = set()
        self._opening: set[asyncio.Task] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._starting = False

    def send(self, exchange: Exchange) -> None:
        """Send now or, if too many turns are open, later. The exchange is told how it ends."""
        if exchange.turn and not self._may_start():
            self._waiting.append(exchange)
        else:
            self._begin(exchange)

    def cancel(self, exchange: Exchange) -> None:
        """Abandon the exchange: close its connection, upon which vLLM drops the request."""
        exchange.cancelled = True
        connection = exchange.connection
        if connection is not None:
            exchange.connection = None
            connection.close()
            self._free(connection, exchange, reusable=False)

    def close(self) -> None:
        """Close all connections. What is under way ends with nothing."""
        self._waiting.clear()
        for task in self._opening:
            task.cancel()
        for connection in list(self._connections):
            connection.close()
        if self._sweep:
            self._sweep.cancel()

    # ------------------------------------------------------------------------------------------------------------------

    def _begin(self, exchange: Exchange) -> None:
        self._turns += exchange.turn
        connection = self._idle_connection()
        if connection is not None:
            return self._write(connection, exchange)
        task = asyncio.get_running_loop().create_task(self._open(exchange))
        self._opening.add(task)
        task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task) -> None:
        self._opening.discard(task)
        self._start_waiting()

    def _may_start(self) -> bool:
        """Whether a turn may be sent, or a connection opened for it."""
        return self._turns < self._limit and (bool(self._idle) or len(self._opening) < MAX_OPENING)

    def _idle_connection(self) -> Connection | None:
        """The one that has been idle for the shortest time: the server keeps it the longest."""
        fresh = asyncio.get_running_loop().time() - KEEP_ALIVE
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since > fresh:
                return connection
            self._close(connection)
        return None

    def _write(self, connection: Connection, exchange: Exchange) -> None:
        try:
            body = exchange.body()
            data = b"%b%d\r\n\r\n%b" % (self._head(exchange.method, exchange.path), len(body), body)
        except Exception as error:  # whatever it is, nobody waits for this call
            self._free(connection, exchange, reusable=True)
            exchange.finish(EngineError(self._engine, f"{exchange.path}: {type(error).__name__}: {error}"))
        else:
            connection.send(exchange, data)

    async def _open(self, exchange: Exchange) -> None:
        """Connect, then send."""
        try:
            connection = await self._connect()
        except Exception as error:  # whatever it is, nobody waits for this task
            self._not_connected(exchange, error)
            return
        if not connection.usable:
            self._not_connected(exchange, ConnectionError("the connection closed at once"))
            return
        self._connections.add(connection)
        if exchange.cancelled:
            self._free(connection, exchange, reusable=True)
        else:
            self._write(connection, exchange)

    async def _connect(self) -> Connection:
        loop, make = asyncio.get_running_loop(), lambda: Connection(self._engine, self._buffer, self._free)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                if self._uds:
                    return (await loop.create_unix_connection(make, self._uds))[1]
                host = self._host if self._tls else None
                transport, connection = await loop.create_connection(
                    make, self._address or self._host, self._port, ssl=self._tls, server_hostname=host
                )
        except OSError:
            self._address = None  # the host may have another one
            raise
        self._address = transport.get_extra_info("peername")[0]  # asked for once, not for every connection
        return connection

    def _not_connected(self, exchange: Exchange, error: Exception) -> None:
        self._turns -= exchange.turn
        ours = isinstance(error, OSError) and error.errno in OUR_LIMITS
        if exchange.turn and ours and self._turns:  # wait for another turn to end
            self._limit = min(self._limit, self._turns)
            self._waiting.appendleft(exchange)
            return
        problem = f"{exchange.path}: {str(error) or type(error).__name__}"
        if ours:
            hint = "a limit of this machine, not of the server; raise it (ulimit -n)"
            outcome = EngineError(self._engine, f"{problem}: {hint}")
        else:
            outcome = EngineDied(self._engine, problem)
        self._start_waiting()
        if not exchange.cancelled:
            exchange.finish(outcome)

    def _free(self, connection: Connection, exchange: Exchange, reusable: bool) -> None:
        """An exchange has ended."""
        self._turns -= exchange.turn
        if reusable:
            loop = asyncio.get_running_loop()
            connection.idle_since = loop.time()
            self._idle.append(connection)
            if self._sweep is None:
                self._sweep = loop.call_later(KEEP_ALIVE, self._close_idle)
        else:
            self._connections.discard(connection)
        self._start_waiting()

    def _start_waiting(self) -> None:
        if self._starting:  # from within the loop below, which goes on
            return
        self._starting = True
        while self._waiting and self._may_start():
            exchange = self._waiting.popleft()
            if not exchange.cancelled:
                self._begin(exchange)
        self._starting = False

    def _close_idle(self) -> None:
        """Close connections that have been idle for long, and check again while some are idle."""
        loop = asyncio.get_running_loop()
        while self._idle and (self._idle[0].lost or self._idle[0].idle_since <= loop.time() - KEEP_ALIVE):
            self._close(self._idle.popleft())
        self._sweep = loop.call_later(KEEP_ALIVE / 2, self._close_idle) if self._idle else None

    def _close(self, connection: Connection) -> None:
        connection.close()
        self._connections.discard(connection)

    def _head(self, method: str, path: str) -> bytes:
        """Request line and headers, up to the length of the body."""
        if (method, path) not in self._heads:
            lines = [f"{method} {self._target}{path} HTTP/1.1", *self._headers, "Content-Length: "]
            self._heads[method, path] = "\r\n".join(lines).encode("ascii")
        return self._heads[method, path]


def _read_url(url: str) -> tuple[str, int, ssl.SSLContext | None, str, list[str]]:
    """Host, port, TLS, path, and headers of every request."""
    try:
        parts = urllib.parse.urlsplit(url.rstrip("/"))
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        host, port = parts.hostname or "", parts.port or (443 if tls else 80)
        name = f"[{host}]" if ":" in host else host.encode("idna").decode()
    except ValueError as error:  # UnicodeError is one
        raise PactError(f"{url!r:.80} is not the URL of a server: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise PactError(f"{url!r:.80} is not the URL of a server, like http://host:8000")
    headers = [
        f"Host: {name if parts.port is None else f'{name}:{port}'}", "Accept: application/json, */*;q=0.1",
        "Accept-Encoding: identity", "User-Agent: pact-fast", "Content-Type: application/json",
    ]  # fmt: skip
    key = os.environ.get("VLLM_API_KEY")
    if key:
        headers.append(f"Authorization: Bearer {key}")
    elif parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers.append(f"Authorization: Basic {base64.b64encode(pair.encode()).decode()}")
    for text, what in ((parts.path, "the path of its URL"), (key or "", "VLLM_API_KEY")):
        if not text.isascii() or not text.isprintable() or " " in text:
            raise PactError(f"{what} has characters that HTTP cannot send")
    return host, port, tls, parts.path, headers
