"""HTTP requests to a vLLM server, from an event loop in a background thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pact_fast.errors import EngineDied, EngineError, EngineTimeout
from pact_fast.rollout.vllm.descriptors import open_request_limit
from pact_fast.rollout.vllm.http_connection import Exchange, HttpResponse
from pact_fast.rollout.vllm.http_pool import ConnectionPool

MAX_TURN_BYTES = 32 << 20  # of the response to a turn: over 200 bytes for each of 131,072 tokens
MAX_RESPONSE_BYTES = (
    256 << 20
)  # of any other: reports of a large mixture of experts have some 100 bytes per tensor and worker


class HttpClient:
    """Connections in an event loop of its own thread; callers block, or start exchanges.

    Its cost per turn does not grow with the number of open ones.

    Args:
        engine: Name of the server, for messages.
        base_url: URL of the server; over a Unix socket only its path matters.
        uds: Path of a Unix socket; None: TCP.

    Turns beyond what the process may open wait for their turn here, so that a limit of this process is not taken for a dead
    server. VLLM_API_KEY in the environment is sent as bearer token. Answers are not compressed, and bounded in size: whatever
    sends more is an EngineError before the rest is read.

    Raises:
        PactError: The URL, or VLLM_API_KEY, cannot be sent.
    """

    def __init__(self, engine: str, base_url: str, uds: str | None):
        self._engine = engine
        self._pool = ConnectionPool(engine, base_url, uds, open_request_limit())
        self._inbox: deque[tuple[Callable[[Exchange], None], Exchange]] = deque()
        self._woken = False  # the loop will look into the inbox
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-http", daemon=True)
        self._thread.start()

    def start(self, exchange: Exchange) -> None:
        """Send a request in the background."""
        self._post(self._pool.send, exchange)

    def cancel(self, exchange: Exchange) -> None:
        """Abandon the exchange. Its `finish` may be running at this moment."""
        self._post(self._pool.cancel, exchange)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """For `Exchange.finish`: call back once all that has arrived is read."""
        self._loop.call_soon(callback)

    def request(self, method: str, path: str, timeout: float, json: dict[str, Any] | None = None) -> HttpResponse:
        """Send a request and wait at most `timeout` seconds for all of its response.

        Raises:
            EngineError: The response is too large or compressed.
            EngineTimeout: There is none in time.
            EngineDied: The connection broke.
        """
        exchange = _Request(method, path, json)
        self.start(exchange)
        try:
            return exchange.response.result(timeout)
        except TimeoutError:
            problem = f"no response to {path} within {timeout:g} s (rollout.engine_timeout)"
            raise EngineTimeout(self._engine, problem) from None
        finally:
            if not exchange.response.done():
                self.cancel(exchange)

    def close(self) -> None:
        """Close all connections and end the thread."""
        self._loop.call_soon_threadsafe(self._pool.close)
        self._loop.call_soon_threadsafe(self._loop.call_soon, self._loop.stop)  # after what closing has scheduled
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()

    def _post(self, action: Callable[[Exchange], None], exchange: Exchange) -> None:
        """Have the loop do something. It is woken once for all that comes before it looks: waking costs more than a look."""
        self._inbox.append((action, exchange))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._empty_inbox)

    def _empty_inbox(self) -> None:
        self._woken = False  # first: what is posted from now on wakes the loop again
        while self._inbox:
            action, exchange = self._inbox.popleft()
            action(exchange)


class _Request(Exchange):
    """A request for which a thread waits."""

    __slots__ = ("_body", "response")

    def __init__(self, method: str, path: str, body: dict[str, Any] | None):
        super().__init__(method, path, MAX_RESPONSE_BYTES, turn=False)
        self._body = b"" if body is None else json.dumps(body).encode()
        self.response: Future[HttpResponse] = Future()

    def body(self) -> bytes:
        return self._body

    def finish(self, outcome: HttpResponse | EngineError) -> None:
        if isinstance(outcome, EngineError):
            self.response.set_exception(outcome)
        else:
            self.response.set_result(outcome)


def checked_json(response: HttpResponse, engine: str) -> Any:
    """The JSON of a response; None if it has none.

    Raises:
        EngineDied: Status 5xx.
        EngineError: Status 4xx or 3xx, or something that is not JSON though it says so.
    """
    path, status = response.path, response.status
    if not 200 <= status < 300:
        text = response.content[:300].decode("utf-8", "replace")
        if status >= 500:
            raise EngineDied(engine, f"status {status} from {path}: {text}")
        raise EngineError(engine, f"{path} refused ({status}): {text}")
    if "json" not in response.kind:
        return None
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and integers of 5000 digits
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else ascii(str(error))[1:-1][:80]
        raise EngineError(engine, f"{path}: the response is not JSON ({problem})") from None
