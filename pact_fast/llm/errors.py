"""Errors of calls to a language model. `reason` is a code that callers count and test; the text is for people."""

from __future__ import annotations

from pact_fast.errors import PactError


class LLMError(PactError):
    """A call that has no result.

    role    the client's role
    reason  a code, see the kinds
    """

    def __init__(self, role: str, reason: str, problem: str):
        self.role, self.reason, self.problem = role, reason, problem
        super().__init__(f"model of role '{role}': {problem} [{reason}]")


class InvalidAnswer(LLMError):
    """The model has answered, and the answer cannot be used, after all repairs. Other calls may well succeed.

    `invalid_json`, `schema`, `check`: it does not hold the requested value; `truncated`: it ends at the token limit;
    `empty`; `tool_call`: a call without a name, or with arguments that are not a JSON object; `refusal`: the
    server has filtered it.
    """

    def __init__(self, role: str, reason: str, problem: str, text: str = ""):
        self.text = text
        super().__init__(role, reason, problem)


class ServerFailed(LLMError):
    """There is no answer, after all retries.

    `refused`: status 3xx or 4xx; `rate_limit`: 429; `unavailable`: status 5xx, or no connection; `timeout`; `deadline`:
    of the whole call; `protocol`: an answer of another shape; `too_large`; `closed`: the client was closed.
    """


class BudgetExceeded(LLMError):
    """The next call could take more tokens than are left. Reason `budget`."""


class ReplayMiss(LLMError):
    """The cache has no answer, and in replay mode no server is asked. Reason `replay_miss`."""
