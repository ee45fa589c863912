"""One HTTP/1.1 connection: requests go out one after the other, and responses are bounded before they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import httptools

from pact_fast.errors import EngineDied, EngineError

MAX_HEAD_BYTES = 64 << 10  # status line and headers of a response
READ_BYTES = 64 << 10


class HttpResponse(NamedTuple):
    """The response to a request: path of the request, status, content type, and all of the body."""

    path: str
    status: int
    kind: str
    content: bytes


class Exchange:
    """A request and the handler of its response. Both methods are called in the thread of the connections.

    method, path  of the request
    limit         bytes of the body of the response
    turn          it counts towards the limit of open turns, and may wait for its turn
    connection    that it is on
    cancelled     the caller has abandoned it
    """

    __slots__ = ("cancelled", "connection", "limit", "method", "path", "turn")

    def __init__(self, method: str, path: str, limit: int, *, turn: bool):
        self.method, self.path, self.limit, self.turn = method, path, limit, turn
        self.connection: Connection | None = None
        self.cancelled = False

    def body(self) -> bytes:
        """JSON to send; empty: none."""
        raise NotImplementedError

    def finish(self, outcome: HttpResponse | EngineError) -> None:
        """Called once, unless the exchange was cancelled."""
        raise NotImplementedError


class Connection(asyncio.BufferedProtocol):
    """A connection, used for one exchange at a time.

    Args:
        engine: Name of the server, for messages.
        buffer: READ_BYTES to read into; the connections of a loop may share it.
        free: Called when an exchange has ended: with the connection, the exchange, and whether the connection can be
            used again.

    Attributes:
        exchange: Under way; None: the connection is idle.
        idle_since: Time of the loop at which it became idle.
        lost: It is closed.
    """

    def __init__(self, engine: str, buffer: memoryview, free: Callable[[Connection, Exchange, bool], None]):
        self._engine, self._buffer, self._free = engine, buffer, free
        self.exchange: Exchange | None = None
        self.idle_since, self.lost = 0.0, False
        self._response: HttpResponse | None = None
        self._refusal: EngineError | None = None
        self._reset()

    def send(self, exchange: Exchange, data: bytes) -> None:
        """Send a request, whose response ends the exchange."""
        self._reset()
        self.exchange, exchange.connection = exchange, self
        self._transport.write(data)

    @property
    def usable(self) -> bool:
        """Whether a request can be sent."""
        return not self.lost and not self._transport.is_closing()

    def close(self) -> None:
        """Close at once; the exchange under way, if any, ends with nothing."""
        self.exchange, self.lost = None, True
        self._transport.abort()

    # -- asyncio -------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        if self.exchange is None:  # nobody asked
            return self.close()
        try:
            self._parser.feed_data(self._buffer[:count])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._reusable = False
            if self._response is None:
                return self._end(EngineDied(self._engine, f"{self.exchange.path}: no HTTP ({error or 'an upgrade'})"))
        if not self._in_body:
            self._head_bytes += count
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(f"the response has more than {MAX_HEAD_BYTES >> 10} KiB of headers")
        if self._refusal is not None:
            self._end(self._refusal)
        elif self._response is not None:
            self._end(self._response)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost, self._reusable = True, False
        if self.exchange is None:
            return
        if error is None and self._ends_with_connection:
            self._end(self._make_response())
        else:
            problem = str(error or "the connection closed before the end of the response")
            self._end(EngineDied(self._engine, f"{self.exchange.path}: {problem}"))

    # -- httptools, whose callbacks only record ------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._response is not None:  # a second response to one request
            self._reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is None:
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._response is not None:
            return
        self._in_body, self._status = True, self._parser.get_status_code()
        encoding = self._headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":  # a few bytes could become gigabytes
            shown = ascii(encoding.decode("latin-1"))[:40]
            self._refuse(f"the response is compressed ({shown}), unasked")
        self._ends_with_connection = not self._headers.keys() & {b"content-length", b"transfer-encoding"}

    def on_body(self, body: bytes) -> None:
        if self._response is not None or self._refusal is not None:
            return
        self._body.append(body)
        self._body_bytes += len(body)
        assert self.exchange
        if self._body_bytes > self.exchange.limit:
            self._refuse(f"the response has more than {self.exchange.limit >> 20} MiB")

    def on_message_complete(self) -> None:
        if self._response is not None:
            return
        if self._status < 200:  # an interim response; the final one follows
            self._reset()
            return
        self._reusable = self._parser.should_keep_alive()
        self._response = self._make_response()

    # ------------------------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._status = self._head_bytes = self._body_bytes = 0
        self._in_body = self._ends_with_connection = self._reusable = False
        self._response = self._refusal = None

    def _make_response(self) -> HttpResponse:
        assert self.exchange
        kind = self._headers.get(b"content-type", b"").decode("latin-1")
        return HttpResponse(self.exchange.path, self._status, kind, b"".join(self._body))

    def _refuse(self, problem: str) -> None:
        assert self.exchange
        if self._refusal is None:
            self._refusal = EngineError(self._engine, f"{self.exchange.path}: {problem}")
        self._reusable = False

    def _end(self, outcome: HttpResponse | EngineError) -> None:
        """End the exchange, and make the connection free first: the next request is sent before this response is read."""
        exchange, reusable = self.exchange, self._reusable and not self.lost
        assert exchange
        exchange.connection = None
        self._reset()
        if reusable:
            self.exchange = None
        else:
            self.close()
        self._free(self, exchange, reusable)
        exchange.finish(outcome)
