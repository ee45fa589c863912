"""HTTP through the `openai` package, from an event loop in a background thread, with deadlines that hold.

The package's own timeout restarts with every byte; here a request is cancelled at its deadline in any case. Answers are
bounded in size before they are read, and are never decompressed. Errors leave this file as plain values, without the
original exception, whose request holds the key.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import ssl
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pact_fast.errors import PactError, error_line
from pact_fast.llm.answers import INSTALL, Malformed, hide, read_answer
from pact_fast.llm.config import SHORTEST_KEY, LLMConfig
from pact_fast.text import one_line

CONNECT_TIMEOUT = 10.0  # seconds
NO_KEY = "none"  # the package insists on one
RETRYABLE_STATUSES = {408, 409, 425, 429}  # statuses after which the same request may succeed, besides 5xx


@dataclass(frozen=True)
class Failure:
    """A request without a usable answer.

    reason     reason code of ServerFailed
    problem    for people, on one line
    retryable  whether the same request may succeed later
    wait       seconds that the server asks to wait before it
    """

    reason: str
    problem: str
    retryable: bool
    wait: float = 0.0


CLOSED = Failure("closed", "the client was closed", False)


class Connection:
    """An endpoint. Thread-safe; closed by `close`.

    Args:
        config: Settings of the client.
        base_url: URL of the endpoint.
        uds: Path of a Unix socket; None: TCP.
    """

    def __init__(self, config: LLMConfig, base_url: str, uds: str | None = None):
        try:
            import openai
        except ImportError:
            raise PactError(f"requests to a language model need the openai package: {INSTALL}") from None
        self._openai, self._limit = openai, config.max_answer_bytes
        key = config.api_key()
        self._secret = key if key and len(key) >= SHORTEST_KEY else None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm-http", daemon=True)
        self._thread.start()
        self._client = self._run(self._make_client(config, base_url, uds, key or NO_KEY)).result()

    def __repr__(self) -> str:
        return f"Connection({self._base_url})"

    def ask(self, body: dict[str, Any], timeout: float) -> Any:
        """Send a request. Returns an Answer, or a Failure.

        Args:
            body: JSON of the request.
            timeout: Seconds after which it is given up.
        """
        future = self._run(self._ask(body, timeout))
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            return CLOSED
        except BaseException:  # Ctrl-C
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel requests under way, close all connections, and end the thread."""
        with contextlib.suppress(Exception):
            self._run(self._cancel_all()).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            self._loop.close()

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def _run(self, coroutine: Any) -> concurrent.futures.Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _make_client(self, config: LLMConfig, base_url: str, uds: str | None, key: str) -> Any:
        self._base_url = base_url
        base: Any = self._openai.DefaultAsyncHttpxClient
        http = self._http = importlib.import_module(base.__mro__[1].__module__.partition(".")[0])  # httpx, or httpx2
        limits = http.Limits(max_connections=None, max_keepalive_connections=config.max_concurrency)
        transport = {"transport": http.AsyncHTTPTransport(uds=uds, limits=limits)} if uds else {}
        client = base(
            timeout=http.Timeout(None, connect=CONNECT_TIMEOUT),
            limits=limits,
            follow_redirects=False,  # nobody else gets the key
            # certificates take a while to load, and are not needed without TLS; with none, no server is trusted
            verify=True if base_url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [self._bound]},
            **transport,
        )
        return self._openai.AsyncOpenAI(api_key=key, base_url=base_url, max_retries=0, timeout=None, http_client=client)

    async def _bound(self, response: Any) -> None:
        """Replace the stream of a response by one that ends with an error when it is too long."""
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":  # a few bytes could become gigabytes
            raise _TooLarge("the answer is compressed, unasked")
        response.stream = _bounded_stream(self._http.AsyncByteStream, response.stream, self._limit)

    async def _ask(self, body: dict[str, Any], timeout: float) -> Any:
        characters = sum(len(str(message.get("content") or "")) for message in body["messages"])
        try:
            data = await asyncio.wait_for(self._post(body), timeout)
            return read_answer(data, characters, self._secret)
        except TimeoutError:
            return Failure("timeout", f"no answer within {timeout:.3g} s", True)
        except Malformed as error:
            return Failure("protocol", f"the server's answer has another shape: {error}", True)
        except Exception as error:
            return self._failure(error)

    async def _post(self, body: dict[str, Any]) -> bytes:
        sent = {"model": body["model"], "messages": body["messages"]}
        rest = {key: value for key, value in body.items() if key not in sent}
        # the body is sent unchanged: the package would validate and reorder named arguments
        response = await self._client.chat.completions.with_raw_response.create(**sent, extra_body=rest)
        return response.http_response.content

    def _failure(self, error: Exception) -> Failure:
        openai = self._openai
        causes = [error, error.__cause__, error.__context__]
        too_large = next((cause for cause in causes if isinstance(cause, _TooLarge)), None)
        if too_large is not None:
            return Failure("too_large", str(too_large), False)
        if isinstance(error, openai.APITimeoutError):
            return Failure("unavailable", f"{self._base_url} does not accept connections", True)
        if isinstance(error, openai.APIStatusError):
            return self._status(error.status_code, error.response)
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            detail = self._shown(f"{type(cause).__name__}: {error_line(cause)}").rstrip(": ")
            return Failure("unavailable", f"the connection to {self._base_url} failed: {detail}", True)
        return Failure("protocol", f"{type(error).__name__}: {self._shown(error_line(error))}", False)

    def _status(self, status: int, response: Any) -> Failure:
        try:
            text = response.content[:300].decode("utf-8", "replace")
        except Exception:  # the body was never read
            text = ""
        problem = f"status {status} of {self._base_url}: {self._shown(text)}"
        if status == 429:
            return Failure("rate_limit", problem, True, _retry_after(response.headers))
        if status >= 500:
            return Failure("unavailable", problem, True, _retry_after(response.headers))
        return Failure("refused", problem, status in RETRYABLE_STATUSES)

    def _shown(self, text: str) -> str:
        return one_line(str(hide(" ".join(text.split()), self._secret)))


class _TooLarge(Exception):
    """The answer is larger than it may be."""


def _bounded_stream(base: Any, stream: Any, limit: int) -> Any:
    """A stream of the HTTP package's kind `base` that raises _TooLarge after `limit` bytes of `stream`."""

    class Bounded(base):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in stream:
                size += len(chunk)
                if size > limit:
                    raise _TooLarge(f"the answer has more than {limit:,} bytes")
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait; 0 if it does not, or not in seconds."""
    with contextlib.suppress(ValueError):
        seconds = float(headers.get("retry-after", "0"))
        return seconds if 0 < seconds < 1e6 else 0.0
    return 0.0
