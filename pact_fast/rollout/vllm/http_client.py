"""HTTP requests to a vLLM server, from an event loop in a background thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

import httpx

from pact_fast.errors import EngineDied, EngineError
from pact_fast.rollout.vllm.descriptors import open_request_limit

CONNECT_TIMEOUT = 10.0  # seconds
MAX_TURN_BYTES = 32 << 20  # of the answer to a turn: over 200 bytes for each of 131,072 tokens
MAX_ANSWER_BYTES = (
    256 << 20
)  # of any other: reports of a large mixture of experts have some 100 bytes per tensor and worker


class HttpClient:
    """One httpx client in an event loop of its own thread; callers block, or start coroutines.

    Args:
        engine: Name of the server, for messages.
        base_url: URL of the server; over a Unix socket only its scheme matters.
        uds: Path of a Unix socket; None: TCP.

    Turns beyond what the process may open wait for their turn here, so that a limit of this process is not taken for a dead
    server. VLLM_API_KEY in the environment is sent as bearer token. Answers are not compressed, and bounded in size: whatever
    sends more is an EngineError before the rest is read.
    """

    def __init__(self, engine: str, base_url: str, uds: str | None):
        self._engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-http", daemon=True)
        self._thread.start()
        self._open_turns = asyncio.Semaphore(open_request_limit())
        self._client: httpx.AsyncClient = self.start(_make_client(base_url, uds)).result()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        """Run a coroutine in the background."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def request(self, method: str, path: str, timeout: float, **kwargs: Any) -> httpx.Response:
        """Send a request and wait at most `timeout` seconds for all of its response.

        Raises:
            EngineError: The response is too large or compressed.
            httpx.HTTPError: There is none.
        """

        async def send() -> httpx.Response:
            try:  # httpx's own timeout starts anew with every byte
                return await asyncio.wait_for(self._send(method, path, MAX_ANSWER_BYTES, **kwargs), timeout)
            except TimeoutError:
                raise httpx.ReadTimeout(f"no answer within {timeout:g} s") from None

        return self.start(send()).result()

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Send the JSON of a turn; for coroutines. Errors: see `request`."""
        async with self._open_turns:
            return await self._send("POST", path, MAX_TURN_BYTES, json=body)

    async def _send(self, method: str, path: str, limit: int, **kwargs: Any) -> httpx.Response:
        async with self._client.stream(method, path, **kwargs) as response:
            encoding = response.headers.get("content-encoding", "identity")
            if encoding != "identity":  # a few bytes could become gigabytes
                raise EngineError(self._engine, f"{path}: the answer is compressed ({ascii(encoding)[:40]}), unasked")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > limit:
                    raise EngineError(self._engine, f"{path}: the answer has more than {limit >> 20} MiB")
            kind = {"content-type": response.headers.get("content-type", "")}
            return httpx.Response(response.status_code, headers=kind, content=bytes(body), request=response.request)

    def close(self) -> None:
        """Close all connections and end the thread."""
        with contextlib.suppress(Exception):
            self.start(self._client.aclose()).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)


async def _make_client(base_url: str, uds: str | None) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    key = os.environ.get("VLLM_API_KEY")
    return httpx.AsyncClient(
        base_url=base_url,
        transport=httpx.AsyncHTTPTransport(uds=uds, limits=limits),
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),  # VllmEngine has a deadline for turns
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    )


def checked_json(response: httpx.Response, engine: str) -> Any:
    """The JSON of a response; None if it has none.

    Raises:
        EngineDied: Status 5xx.
        EngineError: Status 4xx or 3xx, or something that is not JSON though it says so.
    """
    path, status = response.request.url.path, response.status_code
    text = response.content[:300].decode("utf-8", "replace")
    if status >= 500:
        raise EngineDied(engine, f"status {status} from {path}: {text}")
    if not 200 <= status < 300:
        raise EngineError(engine, f"{path} refused ({status}): {text}")
    if "json" not in response.headers["content-type"]:
        return None
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and integers of 5000 digits
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else ascii(str(error))[1:-1][:80]
        raise EngineError(engine, f"{path}: the answer is not JSON ({problem})") from None
