"""ToolActor: answers the calls of an episode so that every observation fits its schema, or is a typed error.

    input schema → injected fault → store → utility in code, or backend → output check → up to two repairs → typed error

The output check: JSON of bounded size, the tool's output schema, no role or tool markup, and no gold answer beyond the
facts behind the call.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pact_fast.envs.simulated.backend import PastCall, ToolBackend, ToolFailure, ToolRequest
from pact_fast.envs.simulated.bm25 import BM25
from pact_fast.envs.simulated.facts import passage_text
from pact_fast.envs.simulated.faults import Faults
from pact_fast.envs.simulated.leaks import leaked, plain_text
from pact_fast.envs.simulated.recorded import ObservationStore, ReplayBackend, canonical, store_key
from pact_fast.envs.simulated.schemas import schema_error
from pact_fast.envs.simulated.utilities import UTILITIES, run_utility
from pact_fast.envs.simulated.world import RESULT_LIMIT, SEARCH, ToolSpec, ToolWorld
from pact_fast.errors import PASSED_ON
from pact_fast.text import short

VERSION = "actor-1"
MAX_REPAIRS = 2
MAX_OUTPUT = 8192  # characters of an observation
MAX_MESSAGE = 300  # characters of an error

# Markup of conversations in some chat template, and beginnings of turns; an output that contains it is rejected
MARKUP = re.compile(
    r"<\|[^|<>]{1,60}\|>|<｜[^｜<>]{1,60}｜>|</?\s*(?:tool_calls?|tool_response|tools?|think(?:ing)?|answer|information|"
    r"function_calls?|observation)\b[^<>]{0,80}>|<(?:start|end)_of_turn>|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|"
    r"AVAILABLE_TOOLS|THINK)\]|<</?SYS>>|</?s>|^\s*(?:system|user|assistant|human|tool|observation)\s*:",
    re.IGNORECASE | re.MULTILINE,
)


class ToolActor:
    """Answers calls. One instance serves all episodes of a process; `episode` starts one.

    Args:
        backend: Answers calls of tools that are no utilities.
        store: Observations that were given before; the rollouts of a group share it.
        faults: Injected faults.
        max_output: Longest observation, in characters.
    """

    def __init__(
        self,
        backend: ToolBackend,
        store: ObservationStore | None = None,
        faults: Faults | None = None,
        max_output: int = MAX_OUTPUT,
    ):
        self.backend, self.faults, self.max_output = backend, faults or Faults(), max_output
        self.store = store or ObservationStore()
        own = f"{VERSION}/{backend.version}"
        replayed = self.store.writer if isinstance(backend, ReplayBackend) else None
        self.version = replayed or own  # a replay looks up what another backend has stored

    def episode(self, task_id: str, world: ToolWorld, answers: Sequence[str] = ()) -> Episode:
        """The calls of one trajectory. `answers` serve the leak check alone; the backend never gets them."""
        return Episode(self, task_id, world, answers)


class Episode:
    """The calls of one trajectory, in order."""

    def __init__(self, actor: ToolActor, task_id: str, world: ToolWorld, answers: Sequence[str]):
        self._actor, self._task_id, self._world, self._answers = actor, task_id, world, tuple(answers)
        self._history: list[PastCall] = []
        self._made: Counter[str] = Counter()

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The observation of a call: JSON text with sorted keys that fits the tool's output schema, or a typed error."""
        try:
            return self._answer(name, arguments)
        except ToolFailure as failure:
            return error_text(failure.kind, failure.message)

    def _answer(self, name: str, arguments: dict[str, Any]) -> str:
        tool = self._world.tools.get(name)
        if tool is None:
            raise ToolFailure("unknown_tool", f"there are: {', '.join(self._world.tools) or 'none'}")
        if (problem := schema_error(arguments, tool.parameters)) is not None:
            raise ToolFailure("invalid_arguments", problem)
        call = canonical([name, arguments])
        fault = self._actor.faults.draw(self._task_id, call, self._made[call])
        self._made[call] += 1
        observation = self._with_fault(fault, tool) or self._stored(tool, call, arguments)
        self._history.append(PastCall(name, arguments, observation))
        return observation

    def _with_fault(self, fault: str | None, tool: ToolSpec) -> str | None:
        """The observation of an injected fault; None if there is none, or the tool has no empty result."""
        if fault == "empty":
            empty: dict[str, Any] = {
                key: [] for key, one in tool.output.get("properties", {}).items() if one.get("type") == "array"
            }
            return observation_text(empty) if empty and schema_error(empty, tool.output) is None else None
        if fault == "timeout":
            return error_text("timeout", "the tool did not answer in time; try again")
        return error_text("rate_limited", "too many requests; try again") if fault else None

    def _stored(self, tool: ToolSpec, call: str, arguments: dict[str, Any]) -> str:
        actor = self._actor
        noisy = tool.kind == SEARCH and actor.faults.is_noisy(self._task_id, call, self._world.progress)
        if noisy:
            return self._noise(tool, arguments)
        history = tuple(self._history) if tool.stateful else ()
        key = store_key(self._task_id, actor.version, tool.name, arguments, _digest(history))
        found = actor.store.get(key)
        if found is not None:
            return found
        try:
            produced = self._produce(tool, arguments, history)
        except ToolFailure as failure:
            if failure.kind == "not_recorded":
                raise
            produced = error_text(failure.kind, failure.message)
        return actor.store.put(key, produced, actor.version)

    def _noise(self, tool: ToolSpec, arguments: dict[str, Any]) -> str:
        """Return the least relevant passages, with any backend."""
        passages = self._world.passages
        scores = BM25([f"{p.title} {p.text}" for p in passages]).scores(str(arguments.get("query", "")))
        worst = sorted(range(len(passages)), key=lambda i: (scores[i], i))[:RESULT_LIMIT]
        output = {"passages": [passage_text(passages[i]) for i in worst]}
        return self._checked(output, tool, arguments)

    def _produce(self, tool: ToolSpec, arguments: dict[str, Any], history: tuple[PastCall, ...]) -> str:
        if tool.kind in UTILITIES:
            return self._checked(run_utility(tool.kind, arguments), tool, arguments)
        rejected: list[tuple[str, str]] = []
        for _ in range(1 + MAX_REPAIRS):
            request = ToolRequest(self._task_id, tool, arguments, self._world, history, tuple(rejected))
            try:
                raw = self._actor.backend.respond(request)
            except (*PASSED_ON, ToolFailure):
                raise
            except Exception as error:  # a third-party backend may raise anything
                raise ToolFailure("unavailable", f"the tool failed ({type(error).__name__})") from error
            try:
                return self._checked(raw, tool, arguments)
            except ToolFailure as failure:
                rejected.append(
                    (raw[: self._actor.max_output] if isinstance(raw, str) else short(raw), failure.message)
                )
        raise ToolFailure("invalid_output", "the tool gave no valid result")

    def _checked(self, raw: Any, tool: ToolSpec, arguments: dict[str, Any]) -> str:
        """The observation of a raw output. ToolFailure `invalid_output` with the reason if it is not valid."""
        limit = self._actor.max_output
        value = _parsed(raw, limit) if isinstance(raw, str) else raw
        if (problem := schema_error(value, tool.output)) is not None:
            raise ToolFailure("invalid_output", problem)
        text = observation_text(value)
        if len(text) > limit:
            raise ToolFailure("invalid_output", f"longer than {limit:,} characters")
        if MARKUP.search(plain_text(value)):
            raise ToolFailure("invalid_output", "it holds role or tool markup")
        if leaked(value, tool, arguments, self._world, self._answers):
            raise ToolFailure("invalid_output", "it says more than the facts behind the call")
        return text


def _parsed(raw: str, limit: int) -> Any:
    """The JSON value of a text. ToolFailure if it is too long or no JSON."""
    if len(raw) > 4 * limit:
        raise ToolFailure("invalid_output", f"longer than {limit:,} characters")

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    try:
        return json.loads(raw, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise ToolFailure("invalid_output", "it is not JSON") from None


def observation_text(value: Any) -> str:
    """JSON with sorted keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def error_text(kind: str, message: str) -> str:
    """A typed error: {"error": {"message", "type"}}."""
    return observation_text({"error": {"message": message[:MAX_MESSAGE], "type": kind}})


def error_kind(observation: str) -> str | None:
    """The type of a typed error; None for any other observation."""
    if not observation.startswith('{"error": {'):
        return None
    try:
        found = json.loads(observation)["error"]["type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def _digest(history: Sequence[PastCall]) -> str:
    if not history:
        return ""
    parts = [canonical([past.tool, past.arguments, past.observation]) for past in history]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
