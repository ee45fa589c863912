"""Calls of environments: copies for foreign ones, threads for blocking ones, and no end of the program."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any

from pact_fast.chat.formats.json_calls import error_observation
from pact_fast.data.types import ToolCall
from pact_fast.envs.base import Environment
from pact_fast.envs.registry import is_built_in
from pact_fast.plugins import no_exit
from pact_fast.rollout.pending import Pending

MAX_CALLS = 256  # of tools and users at a time; a call starts a thread if none is idle


def copy_for(env: Environment, value: Any) -> Any:
    """A copy for an environment of the user's, which may change what it gets. Built-in ones change nothing, and a copy
    of a task takes longer than its reset."""
    return value if is_built_in(type(env)) else copy.deepcopy(value)


def no_exit_in(env: Environment) -> AbstractContextManager[None]:
    """A context in which code of the environment runs: an attempt to end the program is a PactError that names it."""
    return no_exit(f"the environment {type(env).__name__}")


class EnvironmentCalls:
    """Runs methods of environments, those of `blocking` ones in threads."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def tools(self, env: Environment, call: Callable[..., str], attempts: Sequence[ToolCall | str]) -> list[Pending]:
        """Start the calls of a turn. In threads, those of an `ordered` environment wait for the one before.

        Args:
            env: The environment.
            call: Its method that runs a tool.
            attempts: The calls; the text of a malformed one becomes an error observation.
        """
        started: list[Pending] = []
        before: Future | None = None
        for attempt in attempts:
            if isinstance(attempt, str):
                started.append(error_observation(attempt))
                continue
            arguments = copy_for(env, attempt.arguments)
            # a call that is waited for was submitted earlier, so that it has a thread already
            method = functools.partial(_after, before, call) if before else call
            started.append(self.run(env, method, attempt.name, arguments))
            if getattr(env, "ordered", False) and isinstance(started[-1], Future):
                before = started[-1]
        return started

    def run(self, env: Environment, method: Callable[..., str | None], *arguments: Any) -> Pending:
        """Call a method of an environment: its result, or a Future of it if the environment is blocking."""
        if not env.blocking:
            with no_exit_in(env):
                return method(*arguments)
        return self.in_thread(method, *arguments)

    def in_thread(self, method: Callable[..., str | None], *arguments: Any) -> Future:
        """Make a call that may take long."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="tool")
        return self._pool.submit(method, *arguments)

    def close(self) -> None:
        """Stop the threads without waiting for them; calls that have not begun are cancelled."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _after(before: Future, call: Callable[..., str], *arguments: Any) -> str:
    wait([before])
    return call(*arguments)
