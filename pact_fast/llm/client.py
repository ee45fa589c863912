"""LLMClient: questions to a language model, with cache, retries, repairs, deadlines and a budget."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_fast.data.types import Message, ToolCall
from pact_fast.llm.answers import Answer, Unusable, check_schema, read_json, read_tool_calls, schema_validator
from pact_fast.llm.cache import AnswerCache
from pact_fast.llm.config import LLMConfig
from pact_fast.llm.connection import CLOSED, Connection, Failure
from pact_fast.llm.errors import InvalidAnswer, LLMError, ReplayMiss, ServerFailed
from pact_fast.llm.ledger import Ledger
from pact_fast.llm.request import Request, request_body, request_key
from pact_fast.text import short

FIRST_WAIT, MAX_WAIT = 0.5, 30.0  # seconds before the first retry, and before any


@dataclass(frozen=True)
class Completion:
    """A valid answer.

    text        the model's text
    value       its JSON value, which fits the request's schema; None without a schema
    tool_calls  calls of tools, with arguments that are JSON objects (their fit to the tools' schemas is not checked)
    reasoning   hidden reasoning, if the server tells it apart
    finish_reason
    prompt_tokens, completion_tokens
    cached      whether the cache gave it
    repairs     invalid answers before it
    key         of its request, in the cache
    """

    text: str
    value: Any
    tool_calls: tuple[ToolCall, ...]
    reasoning: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool
    repairs: int
    key: str


class LLMClient:
    """Asks a language model for one role. Thread-safe; `close` it, or use it in a `with` statement.

    Nothing is connected, started or imported before a question that the cache cannot answer.

    Args:
        config: Endpoint, sampling, deadlines, budget, cache.
        role: Who asks ("tool_maker"), for the report and for errors.
    """

    def __init__(self, config: LLMConfig, role: str, *, _shared: _Shared | None = None):
        self.config, self.role = config, role
        self._shared = _shared or _Shared(config)

    def __repr__(self) -> str:
        return f"LLMClient({self.config.model!r}, role={self.role!r})"

    def __enter__(self) -> LLMClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def with_role(self, role: str) -> LLMClient:
        """A client for another role with the same connections, cache, budget and report."""
        return LLMClient(self.config, role, _shared=self._shared)

    def close(self) -> None:
        """Cancel running requests, and close the connections and the started server, for all roles that share them.

        What the cache holds is answered afterwards, too; all else is a ServerFailed.
        """
        self._shared.close()

    def report(self) -> dict[str, Any]:
        """Tokens, seconds, cache hits and cost by role and model, as plain data (see `Usage`)."""
        return self._shared.ledger.report()

    def complete(self, messages: Sequence[Message], **options: Any) -> Completion:
        """Ask one question. `options`: fields of `Request` (schema, tools, sample, temperature, repairs, check, …).

        Raises:
            InvalidAnswer: The answer cannot be used, after all repairs.
            ServerFailed: There is none, after all retries.
            BudgetExceeded: The token budget is used up.
            ReplayMiss: Replay mode, and the cache has no answer.
        """
        return self.ask(Request(messages, **options))

    def ask(self, request: Request) -> Completion:
        """`complete` of a Request."""
        deadline = time.monotonic() + self.config.total_timeout
        try:
            return self._ask(request, deadline)
        except LLMError as error:
            self._shared.ledger.failed(self.role, self.config.model, error.reason)
            raise

    def map(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Completion | InvalidAnswer]:
        """Ask many questions, `max_concurrency` at a time.

        Args:
            requests: The questions.
            progress: Called in this thread with (answered, all) after each answer.

        Returns:
            For each request, in their order, its completion, or the error of an answer that cannot be used.

        Raises:
            LLMError: Of any other kind, after the questions under way have ended; no further one is asked.
        """
        lock, done = threading.Condition(), 0
        results: list[Completion | InvalidAnswer | None] = [None] * len(requests)
        fatal: list[BaseException] = []
        order = iter(range(len(requests)))

        def work() -> None:
            nonlocal done
            while True:
                with lock:
                    index = None if fatal else next(order, None)
                if index is None:
                    return
                try:
                    result: Completion | InvalidAnswer = self.ask(requests[index])
                except InvalidAnswer as error:
                    result = error
                except BaseException as error:
                    with lock:
                        fatal.append(error)
                        lock.notify()
                    return
                with lock:
                    results[index] = result
                    done += 1
                    lock.notify()

        count = min(self.config.max_concurrency, len(requests))
        with ThreadPoolExecutor(max(count, 1), thread_name_prefix="llm-map") as pool:
            try:
                for _ in range(count):
                    pool.submit(work)
                seen = 0
                while seen < len(requests) and not fatal:
                    with lock:
                        while done == seen and not fatal:
                            lock.wait()
                        seen = done
                    if progress is not None:
                        progress(seen, len(requests))
            except BaseException as error:  # Ctrl-C, or of `progress`
                fatal.append(error)  # workers take no further question
                self.close()  # and wait for no answer
                raise
        if fatal:
            raise fatal[0]
        return results  # type: ignore[return-value]

    def _ask(self, request: Request, deadline: float) -> Completion:
        """Ask, and ask again with the error as long as the answer is invalid and repairs are left."""
        repairs = 0
        if request.schema is not None:
            schema_validator(request.schema)  # before anything is paid
        while True:
            key, answer, cached = self._answer(request, deadline)
            try:
                return self._completion(request, key, answer, cached, repairs)
            except Unusable as error:
                if repairs == request.repairs:
                    problem = f"{error.problem} (after {repairs} repairs)" if repairs else error.problem
                    raise InvalidAnswer(self.role, error.reason, problem, answer.text) from None
                request, repairs = request.answered(answer.text, error.problem), repairs + 1
                self._shared.ledger.repaired(self.role, self.config.model)

    def _completion(self, request: Request, key: str, answer: Answer, cached: bool, repairs: int) -> Completion:
        """Return the checked answer. Unusable if it is invalid."""
        if answer.finish_reason in ("content_filter", "refusal"):
            raise Unusable("refusal", "the server has filtered the answer")
        if answer.finish_reason == "length":
            raise Unusable("truncated", "it ends at the token limit (max_tokens); be shorter")
        calls = tuple(read_tool_calls(answer))
        if not answer.text.strip() and not calls:
            raise Unusable("empty", "it is empty")
        value = None
        if request.schema is not None and not calls:
            value = read_json(answer.text)
            check_schema(value, request.schema)
        problem = request.check(value if request.schema is not None else answer.text) if request.check else None
        if problem is not None:
            raise Unusable("check", problem)
        return Completion(
            answer.text, value, calls, answer.reasoning, answer.finish_reason, answer.prompt_tokens,
            answer.completion_tokens, cached, repairs, key,
        )  # fmt: skip

    def _answer(self, request: Request, deadline: float) -> tuple[str, Answer, bool]:
        """(key, answer, whether the cache gave it). Threads that ask the same at the same time ask the server once."""
        body = request_body(self.config, request)
        key = request_key(body, request.schema, request.sample)
        with self._shared.single_flight(key):
            answer = self._shared.cached(key)
            if answer is not None:
                self._shared.ledger.answered(self.role, self.config.model, key, answer, None)
                return key, answer, True
            if self.config.replay:
                last = body["messages"][-1] if body["messages"] else {}
                raise ReplayMiss(
                    self.role,
                    "replay_miss",
                    f"{self.config.cache_dir} has no answer {key} to {short(last.get('content'))}; run once without "
                    "replay=true, with the same settings",
                )
            tokens = body[self.config.max_tokens_field] + _prompt_tokens(body)
            # until it is charged: between the two, another call could take what this one has spent
            with self._shared.ledger.reserve(self.role, tokens, deadline):
                start = time.monotonic()
                answer = self._shared.send(self.role, body, deadline)
                seconds = time.monotonic() - start
                self._shared.ledger.answered(self.role, self.config.model, key, answer, seconds)
            kept = self._shared.keep(key, answer, self.role, {**body, "sample": request.sample})
            return key, kept, False


class _Shared:
    """State shared by the roles of one endpoint."""

    def __init__(self, config: LLMConfig):
        self._config = config
        self.ledger = Ledger(config.token_budget, config.price)
        self._cache = AnswerCache(Path(config.cache_dir)) if config.cache_dir else None
        self._slots = threading.BoundedSemaphore(config.max_concurrency)
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._connection: Connection | None = None
        self._server: Any = None
        self._flights: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def single_flight(self, key: str) -> Iterator[None]:
        """One thread at a time inside, for each key; without a cache there is nothing to wait for."""
        if self._cache is None:
            yield
            return
        with self._lock:
            flight, waiting = self._flights.get(key, (threading.Lock(), 0))
            self._flights[key] = flight, waiting + 1
        try:
            with flight:
                yield
        finally:
            with self._lock:
                flight, waiting = self._flights[key]
                if waiting == 1:
                    del self._flights[key]
                else:
                    self._flights[key] = flight, waiting - 1

    def cached(self, key: str) -> Answer | None:
        return self._cache.get(key) if self._cache else None

    def keep(self, key: str, answer: Answer, role: str, request: dict[str, Any]) -> Answer:
        return self._cache.put(key, answer, role, request) if self._cache else answer

    def send(self, role: str, body: dict[str, Any], deadline: float) -> Answer:
        """The server's answer, after retries. ServerFailed."""
        for retry in range(self._config.max_retries + 1):
            result = self._try(role, body, deadline)
            if not isinstance(result, Failure):
                return result
            wait = max(result.wait, _backoff(retry))
            if not result.retryable or retry == self._config.max_retries:
                raise ServerFailed(role, result.reason, result.problem + (f" (after {retry} retries)" if retry else ""))
            if time.monotonic() + wait >= deadline:
                raise ServerFailed(
                    role, "deadline", f"no answer before the deadline of the call; last: {result.problem}"
                )
            self.ledger.retried(role, self._config.model)
            self._closed.wait(wait)
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            connection, self._connection = self._connection, None
            server, self._server = self._server, None
        if connection is not None:
            connection.close()
        if server is not None:
            server.close()

    def _try(self, role: str, body: dict[str, Any], deadline: float) -> Answer | Failure:
        """One request, once there is a free slot."""
        connection = self._connect(role)
        if not self._slots.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise ServerFailed(role, "deadline", "no free slot before the deadline of the call (max_concurrency)")
        try:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ServerFailed(role, "deadline", "no answer before the deadline of the call")
            return connection.ask(body, min(self._config.timeout, left))
        finally:
            self._slots.release()

    def _connect(self, role: str) -> Connection:
        with self._lock:
            if self._closed.is_set():
                raise ServerFailed(role, CLOSED.reason, CLOSED.problem)
            if self._connection is None:
                if self._config.base_url is None:
                    from pact_fast.llm.server import VllmServer

                    self._server = VllmServer(self._config)
                    self._connection = self._server.connection
                else:
                    self._connection = Connection(self._config, self._config.base_url)
            return self._connection


def _prompt_tokens(body: dict[str, Any]) -> int:
    """An estimate of the prompt's tokens, rather too high: one for three bytes."""
    asked = [body["messages"], body.get("tools", [])]
    return len(json.dumps(asked, ensure_ascii=False).encode()) // 3


def _backoff(retry: int) -> float:
    """Seconds before a retry: doubled each time, with jitter, so that clients that failed together come back apart."""
    return random.uniform(0.5, 1.0) * min(FIRST_WAIT * 2**retry, MAX_WAIT)
