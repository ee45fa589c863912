"""HTTP requests to a vLLM server, from an event loop in a background thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp

from pact_fast.errors import EngineDied, EngineError, EngineTimeout
from pact_fast.rollout.vllm.descriptors import open_request_limit

CONNECT_TIMEOUT = 60.0  # seconds; thousands of connections that open at once take some of them
KEEP_ALIVE = 2.0  # seconds that an idle connection is kept; vLLM closes it after 5, perhaps while we send
MAX_TURN_BYTES = 32 << 20  # of the answer to a turn: over 200 bytes for each of 131,072 tokens
MAX_ANSWER_BYTES = (
    256 << 20
)  # of any other: reports of a large mixture of experts have some 100 bytes per tensor and worker


class Answer(NamedTuple):
    """The response to a request: path of the request, status, content type, and all of the body."""

    path: str
    status: int
    kind: str
    content: bytes


class HttpClient:
    """One aiohttp session in an event loop of its own thread; callers block, or start coroutines.

    Its cost per turn does not grow with the number of open ones.

    Args:
        engine: Name of the server, for messages.
        base_url: URL of the server; over a Unix socket only its scheme matters.
        uds: Path of a Unix socket; None: TCP.

    Turns beyond what the process may open wait for their turn here, so that a limit of this process is not taken for a dead
    server. VLLM_API_KEY in the environment is sent as bearer token. Answers are not compressed, and bounded in size: whatever
    sends more is an EngineError before the rest is read.
    """

    def __init__(self, engine: str, base_url: str, uds: str | None):
        self._engine, self._base_url = engine, base_url.rstrip("/")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-http", daemon=True)
        self._thread.start()
        self._open_turns = asyncio.Semaphore(open_request_limit())
        self._session: aiohttp.ClientSession = self.start(_make_session(uds)).result()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        """Run a coroutine in the background."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def request(self, method: str, path: str, timeout: float, json: dict[str, Any] | None = None) -> Answer:
        """Send a request and wait at most `timeout` seconds for all of its response.

        Raises:
            EngineError: The response is too large or compressed.
            EngineTimeout: There is none in time.
            EngineDied: The connection broke.
        """

        async def send() -> Answer:
            try:  # a timeout of the session would start anew with every byte
                return await asyncio.wait_for(self._send(method, path, MAX_ANSWER_BYTES, json), timeout)
            except TimeoutError:
                problem = f"no answer to {path} within {timeout:g} s (rollout.engine_timeout)"
                raise EngineTimeout(self._engine, problem) from None

        return self.start(send()).result()

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        """Send the JSON of a turn; for coroutines. Errors: see `request`."""
        async with self._open_turns:
            return await self._send("POST", path, MAX_TURN_BYTES, body)

    async def _send(self, method: str, path: str, limit: int, body: dict[str, Any] | None) -> Answer:
        async with self._response(method, path, body) as response:
            encoding = response.headers.get("content-encoding", "identity")
            if encoding != "identity":  # a few bytes could become gigabytes
                raise EngineError(self._engine, f"{path}: the answer is compressed ({ascii(encoding)[:40]}), unasked")
            content = bytearray()
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > limit:
                    response.close()
                    raise EngineError(self._engine, f"{path}: the answer has more than {limit >> 20} MiB")
            return Answer(path, response.status, response.headers.get("content-type", ""), bytes(content))

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response without its body. EngineDied if the connection breaks, while the body is read, too."""
        try:
            async with self._session.request(
                method, self._base_url + path, json=body, allow_redirects=False
            ) as response:
                yield response
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a response that is no HTTP
            raise EngineDied(self._engine, f"{path}: {str(error) or type(error).__name__}") from None

    def close(self) -> None:
        """Close all connections and end the thread."""
        with contextlib.suppress(Exception):
            self.start(self._session.close()).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)


async def _make_session(uds: str | None) -> aiohttp.ClientSession:
    kept: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEEP_ALIVE}
    key = os.environ.get("VLLM_API_KEY")
    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(uds, **kept) if uds else aiohttp.TCPConnector(**kept),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),  # VllmEngine has a deadline for turns
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def checked_json(answer: Answer, engine: str) -> Any:
    """The JSON of an answer; None if it has none.

    Raises:
        EngineDied: Status 5xx.
        EngineError: Status 4xx or 3xx, or something that is not JSON though it says so.
    """
    path, status = answer.path, answer.status
    text = answer.content[:300].decode("utf-8", "replace")
    if status >= 500:
        raise EngineDied(engine, f"status {status} from {path}: {text}")
    if not 200 <= status < 300:
        raise EngineError(engine, f"{path} refused ({status}): {text}")
    if "json" not in answer.kind:
        return None
    try:
        return json.loads(answer.content)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and integers of 5000 digits
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else ascii(str(error))[1:-1][:80]
        raise EngineError(engine, f"{path}: the answer is not JSON ({problem})") from None
