"""Usage of calls by role and model, and their shared token budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from pact_fast.llm.answers import Answer
from pact_fast.llm.config import Price
from pact_fast.llm.errors import BudgetExceeded, ServerFailed


@dataclass
class Usage:
    """Counts of one role with one model.

    requests           requests that the server has answered
    hits               answers from the cache
    retries            requests that were sent again
    repairs            invalid answers that were sent back
    failures           reason code -> calls that had no result
    prompt_tokens      of answers by the server
    completion_tokens  as above
    cached_tokens      prompt and completion, of answers from the cache
    seconds            of waiting for the server, all requests added up
    """

    requests: int = 0
    hits: int = 0
    retries: int = 0
    repairs: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0


class Ledger:
    """Usage of all roles that share an endpoint, and their budget. Thread-safe.

    Answers of the server are charged to the budget, and so is the first use of an answer from the cache. So a run that was
    stopped and resumed ends where it would have ended at once, and the budget bounds what all its starts pay together.
    """

    def __init__(self, budget: int | None, price: Price | None):
        self._budget, self._price = budget, price
        self._change = threading.Condition()
        self._spent = self._reserved = 0
        self._charged: set[str] = set()
        self._usage: dict[tuple[str, str], Usage] = {}

    @contextmanager
    def reserve(self, role: str, tokens: int, deadline: float) -> Iterator[None]:
        """Reserve the tokens that a request may take while it is running.

        Waits while requests under way could use up the budget, until they have ended or the deadline has passed.

        Raises:
            BudgetExceeded: Too little is left even if they take nothing.
            ServerFailed: The deadline has passed.
        """
        if self._budget is None:
            yield
            return
        with self._change:
            while self._spent + self._reserved + tokens > self._budget:
                if self._spent + tokens > self._budget:
                    raise BudgetExceeded(
                        role,
                        "budget",
                        f"{self._spent:,} of token_budget={self._budget:,} tokens are spent, and the next call may take "
                        f"{tokens:,}; raise it, and start again: answers in the cache are kept",
                    )
                if not self._change.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise ServerFailed(role, "deadline", "no answer before the deadline of the call")
            self._reserved += tokens
        try:
            yield
        finally:
            with self._change:
                self._reserved -= tokens
                self._change.notify_all()

    def answered(self, role: str, model: str, key: str, answer: Answer, seconds: float | None) -> None:
        """Count an answer. `seconds`: that the server took; None: it is from the cache."""
        with self._change:
            usage = self._of(role, model)
            if seconds is None:
                usage.hits += 1
                usage.cached_tokens += answer.tokens
            else:
                usage.requests += 1
                usage.prompt_tokens += answer.prompt_tokens
                usage.completion_tokens += answer.completion_tokens
                usage.seconds += seconds
            if seconds is not None or key not in self._charged:
                self._spent += answer.tokens
            self._charged.add(key)
            self._change.notify_all()

    def retried(self, role: str, model: str) -> None:
        with self._change:
            self._of(role, model).retries += 1

    def repaired(self, role: str, model: str) -> None:
        with self._change:
            self._of(role, model).repairs += 1

    def failed(self, role: str, model: str, reason: str) -> None:
        with self._change:
            failures = self._of(role, model).failures
            failures[reason] = failures.get(reason, 0) + 1

    def report(self) -> dict[str, Any]:
        """Plain data: the budget, and the usage of each role with each model, with its cost if a price is known."""
        with self._change:
            rows = [
                {"role": role, "model": model, **asdict(usage), **self._cost(usage)}
                for (role, model), usage in sorted(self._usage.items())
            ]
            return {"tokens_charged": self._spent, "token_budget": self._budget, "usage": rows}

    def _of(self, role: str, model: str) -> Usage:
        return self._usage.setdefault((role, model), Usage())

    def _cost(self, usage: Usage) -> dict[str, float]:
        if self._price is None:
            return {}
        cost = usage.prompt_tokens * self._price.input + usage.completion_tokens * self._price.output
        return {"cost": cost / 1e6}
