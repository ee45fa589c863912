"""HTTP requests to a vLLM server, from an event loop in a background thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

import httpx

from pact_fast.errors import EngineDied, EngineError

CONNECT_TIMEOUT = 10.0  # seconds


class HttpClient:
    """One httpx client in an event loop of its own thread; callers block, or start coroutines.

    Args:
        base_url: URL of the server; over a Unix socket only its scheme matters.
        uds: Path of a Unix socket; None: TCP.

    VLLM_API_KEY in the environment is sent as bearer token.
    """

    def __init__(self, base_url: str, uds: str | None):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-http", daemon=True)
        self._thread.start()
        self._client: httpx.AsyncClient = self.start(_make_client(base_url, uds)).result()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        """Run a coroutine in the background."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """Send a request and wait for its response. Raises httpx.HTTPError."""
        return self.start(self._client.request(method, path, **kwargs)).result()

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Send JSON; for coroutines."""
        return await self._client.post(path, json=body)

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
        headers={"Authorization": f"Bearer {key}"} if key else None,
    )


def checked_json(response: httpx.Response, engine: str) -> Any:
    """The JSON of a response; None if it has none.

    Raises:
        EngineDied: Status 5xx.
        EngineError: Status 4xx.
    """
    path = response.request.url.path
    if response.status_code >= 500:
        raise EngineDied(engine, f"status {response.status_code} from {path}: {response.text[:300]}")
    if response.status_code >= 400:
        raise EngineError(engine, f"{path} refused ({response.status_code}): {response.text[:300]}")
    return response.json() if "json" in response.headers.get("content-type", "") else None
