"""The agent loop with messages in the place of tokens: actors that write messages run in it as policies do.

Limits, tools in threads, users, tools that appear late and rewards are those of `rollout/agent.py`. A "token" is the number
of a message, or of a prompt, in a table; `END` ends a turn.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np

from pact_fast.chat.formats.base import ParsedTurn
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.tool_schema import call_error
from pact_fast.components import Component
from pact_fast.config import RolloutConfig
from pact_fast.data.types import Message, Task, ToolCall, ToolSchema, Trajectory
from pact_fast.envs.base import Environment
from pact_fast.rollout.agent import AgentLoop
from pact_fast.rollout.engine import Completion, Engine, Request
from pact_fast.rollout.episode import Job
from pact_fast.users.endpoint import EndpointUsers

Key = tuple[int, ...]  # of an episode: (row, attempt)
END = 0
BYTES_PER_TOKEN = 4  # by which limits of observations, which are given in tokens, are estimated


@dataclass(frozen=True)
class Context:
    """State of an episode that an actor is shown.

    key       of the episode
    messages  the prompt, and all messages since; assistant turns as `assistant_message` writes them
    tools     of the task
    turns     assistant turns so far
    """

    key: Key
    messages: list[Message]
    tools: list[ToolSchema]
    turns: int


class CannotAct(Exception):
    """The actor has no next turn. `reason`: a key of `verify.REASONS`."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(reason)


class Actor(Protocol):
    """Writes assistant turns. `workers`: how many it writes at a time, each in a thread."""

    workers: int

    def act(self, context: Context) -> ParsedTurn:
        """The next turn; its calls are checked later. CannotAct: the episode ends here."""


def assistant_message(turn: ParsedTurn) -> Message:
    """The message of a turn, without its reasoning."""
    message: Message = {"role": "assistant", "content": turn.content}
    if turn.calls:
        message["tool_calls"] = [{"type": "function", "function": call.to_json()} for call in turn.calls]
    return message


def play(
    tasks: Sequence[tuple[Key, Task]],
    actor: Actor,
    make_env: Callable[[Task], Environment],
    config: RolloutConfig,
    on_finish: Callable[[], object] = lambda: None,
    users: EndpointUsers | None = None,
) -> tuple[list[Trajectory], dict[Key, CannotAct]]:
    """Run an actor on tasks.

    Args:
        tasks: (key, task) of each.
        actor: Who acts.
        make_env: A fresh environment for a task.
        config: Limits of turns and time.
        on_finish: Called as each episode ends.
        users: Makes the users of `rollout.user=endpoint`.

    Returns:
        The trajectories in the order of the tasks, and by key why an actor had no next turn. Their tokens mean nothing.
    """

    def ended(index: int, trajectory: Trajectory) -> None:
        on_finish()

    table = MessageTable()
    engine = ActorEngine(table, actor)
    # a separate function: shared resources of environments, such as a process pool, serve the next call, too
    loop = AgentLoop(engine, cast(ChatRenderer, table), lambda task: make_env(task), config, users)
    try:
        return loop.run([Job(task, key) for key, task in tasks], ended), engine.failures
    finally:
        engine.shutdown()
        loop.close()


class MessageTable:
    """The interface of ChatRenderer that the agent loop uses, for messages instead of tokens."""

    eot_id = call_eot_id = END
    eot_ids = frozenset((END,))

    def __init__(self) -> None:
        self._entries: list[Any] = [None]  # of END

    def entries(self, ids: np.ndarray) -> list[Any]:
        """Prompts, messages and turns by their numbers, without END."""
        return [self._entries[number] for number in ids.tolist() if number != END]

    def _add(self, entry: Any) -> int:
        self._entries.append(entry)
        return len(self._entries) - 1

    def prompt_ids(self, messages: list[Message], tools: Sequence[ToolSchema]) -> np.ndarray:
        return np.array([self._add((list(messages), list(tools)))], np.int64)

    def bridge_tokens(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([self._add(message) for message in messages], np.int64)
        return ids, np.full(len(ids), Component.OBSERVATION, np.uint8)

    def turn_ids(self, turn: ParsedTurn) -> np.ndarray:
        return np.array([self._add(turn), END], np.int64)

    def parse(self, ids: np.ndarray, tools: Sequence[ToolSchema]) -> ParsedTurn:
        """The turn, with an error text in the place of every call that does not fit its tool."""
        (turn,) = self.entries(ids) or [ParsedTurn("")]
        attempts = [
            call_error(attempt, tools) or attempt if isinstance(attempt, ToolCall) else attempt
            for attempt in turn.attempts
        ]
        return replace(turn, attempts=attempts, components=np.full(len(ids), Component.ANSWER, np.uint8))

    def truncate(self, text: str, max_tokens: int) -> str:
        room = max_tokens * BYTES_PER_TOKEN
        return text if len(text) <= room else f"{text[:room]}… [cut: {len(text) - room:,} characters]"


@dataclass
class _Session:
    """An episode as the engine knows it."""

    key: Key
    messages: list[Message] = field(default_factory=list)
    tools: list[ToolSchema] = field(default_factory=list)
    turns: int = 0


class ActorEngine(Engine):
    """An engine whose turns an actor writes. `failures`: by key, why an actor had no next turn."""

    name = "the actor"

    def __init__(self, table: MessageTable, actor: Actor):
        self._table, self._actor = table, actor
        self._sessions: dict[int, _Session] = {}
        self._done: queue.SimpleQueue[tuple[int, ParsedTurn | BaseException]] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(max(actor.workers, 1), thread_name_prefix="actor")
        self.failures: dict[Key, CannotAct] = {}

    def submit(self, request: Request) -> None:
        session = self._sessions.setdefault(request.session, _Session(request.rng_key))
        for entry in self._table.entries(request.ids):
            if isinstance(entry, tuple):
                session.messages += entry[0]
                session.tools = entry[1]
            else:
                session.messages.append(entry)
        context = Context(session.key, list(session.messages), session.tools, session.turns)
        self._pool.submit(self._act, request.session, context)

    def _act(self, number: int, context: Context) -> None:
        try:
            self._done.put((number, self._actor.act(context)))
        except BaseException as error:  # raised again where the loop waits
            self._done.put((number, error))

    def step(self, timeout: float | None = None) -> list[Completion]:
        try:
            number, result = self._done.get(timeout=timeout)
        except queue.Empty:
            return []
        session = self._sessions.get(number)
        if session is None:  # closed meanwhile
            return []
        if isinstance(result, CannotAct):
            self.failures[session.key] = result
            return [self._completion(number, np.array([END], np.int64), ended=False)]
        if isinstance(result, BaseException):
            raise result
        session.turns += 1
        session.messages.append(assistant_message(result))
        return [self._completion(number, self._table.turn_ids(result), ended=True)]

    def _completion(self, number: int, ids: np.ndarray, ended: bool) -> Completion:
        return Completion(number, ids, np.zeros(len(ids), np.float32), ended, version=0)

    def close(self, session: int) -> None:
        self._sessions.pop(session, None)

    def update_weights(self, model: Any, version: int) -> None:
        """An actor has none."""
        return

    def shutdown(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
