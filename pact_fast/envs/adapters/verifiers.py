"""The environment `verifiers`: environments of the package of that name, by their `load_environment`, and tasksets."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from pydantic import Field

from pact_fast.data.types import Task, ToolSchema, Trajectory, TurnRecord
from pact_fast.envs.adapters.arguments import BadCall, copy_arguments
from pact_fast.envs.adapters.background import run
from pact_fast.envs.adapters.options import Args, need, read_args
from pact_fast.envs.adapters.results import cut, failure
from pact_fast.envs.adapters.verifiers_tasks import (
    INSTALL,
    DatasetTasks,
    has_tasksets,
    load,
    message_of,
    row_of_task,
    schema_of,
)
from pact_fast.envs.adapters.verifiers_tasksets import TasksetTasks, VerifiersTaskset, load_taskset
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.plugins import describe_error


class VerifiersArgs(Args):
    """`env.args` of the environment.

    id    name of an installed environment, or `file.py:load_environment`; from 0.4 on of a taskset, or `file.py:Class`
    args  arguments of its load_environment; settings of the taskset
    """

    id: str
    args: dict[str, Any] = Field(default_factory=dict)


@functools.lru_cache(maxsize=8)
def _loaded(id: str, args: str) -> Any:
    """One instance of the package's environment serves all rollouts, as in the package; each has its own state."""
    return load(id, json.loads(args))


def _load(read: VerifiersArgs) -> Any:
    return _loaded(read.id, json.dumps(read.args, sort_keys=True))


def _load_taskset(read: VerifiersArgs) -> TasksetTasks:
    return load_taskset(read.id, json.dumps(read.args, sort_keys=True))


@environment("verifiers")
class Verifiers:
    """One rollout of an environment of the package: its state, its tools, its rubric.

    Args:
        env: The package's environment.
    """

    blocking = True
    ordered = True
    needs_tools = False

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Verifiers | VerifiersTaskset]:
        """PactError if the environment cannot be loaded, or needs an unsupported feature."""
        read = read_args(VerifiersArgs, args)
        if has_tasksets():
            return functools.partial(VerifiersTaskset, _load_taskset(read))
        env = _load(read)
        package = need("verifiers", INSTALL)
        # these two end with the first turn without a call
        plain = isinstance(env, package.SingleTurnEnv | package.ToolEnv)
        return functools.partial(Verifiers if plain else VerifiersDialogue, env)

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> DatasetTasks | TasksetTasks:
        """The rows of the environment's dataset, or the tasks of the taskset, in its order."""
        read = read_args(VerifiersArgs, args)
        if has_tasksets():
            return _load_taskset(read)
        return DatasetTasks(_load(read), read.id.rpartition("/")[2].partition(".py:")[0])

    def __init__(self, env: Any):
        self._env = env
        self._types = need("verifiers.types", INSTALL)
        self._state: Any = None
        self._messages: list[Any] = []  # of the dialogue so far, in the package's classes
        self._in_turn = self._over = (
            False  # whether a call of the turn under way has run; whether the episode has ended
        )

    def reset(self, task: Task) -> str | None:
        # the package wants a client; environments that ask the model themselves are refused before
        client: Any = object.__new__(_no_client())
        try:
            self._state = run(self._start(row_of_task(task), client))
        except Exception as error:
            raise PactError(f"task {task.id}: setup of {self._name} failed: {describe_error(error)}") from error
        self._messages = list(self._state["prompt"])
        self._in_turn = self._over = False
        return None

    @property
    def tools(self) -> list[ToolSchema]:
        return [schema_of(tool) for tool in self._state["tool_defs"]]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The environment's response to one call. The calls of a turn are one step of its trajectory."""
        known = [tool.name for tool in self._state["tool_defs"]]
        if name not in known:
            return f"error: there is no tool {name[:60]!r}; the tools are: {', '.join(known)}"
        try:
            given = json.dumps(copy_arguments(arguments))
        except BadCall as error:
            return f"error: {error}"
        call = self._types.ToolCall(id=f"call_{len(self._messages)}", name=name, arguments=given)
        said = self._types.AssistantMessage(content="", tool_calls=[call])
        if self._in_turn:
            completion = self._state["trajectory"][-1]["completion"][0]
            completion.tool_calls = [*completion.tool_calls, call]
        else:
            self._add_step(said.model_copy())
        self._messages.append(said)
        try:
            answered = run(self._step())
        except Exception as error:
            self._state["error"] = error
            return failure(error)
        if answered is None:
            self._over = True
            return "error: the episode is over"
        return cut("\n".join(str(message["content"]) for message in answered if message["role"] == "tool"))

    def finished(self) -> bool:
        """Whether the environment has ended the episode in the turn under way.

        As in the package, its stop conditions are asked before it answers a turn: what its answer changes counts after the
        policy's next turn, unless it is marked as the final one.
        """
        self._in_turn = False
        return self._over

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`success`: the rubric's weighted reward; and each of its functions by name."""
        state = self._state
        self._replay(trajectory)
        try:
            run(self._score(state))
        except Exception as error:
            raise PactError(f"task {task.id}: the rubric of {self._name} failed: {describe_error(error)}") from error
        metrics = {name: float(value) for name, value in (state["metrics"] or {}).items()}
        return {**metrics, "success": float(state["reward"])}

    @property
    def _name(self) -> str:
        return type(self._env).__name__

    async def _start(self, row: dict[str, Any], client: Any) -> Any:
        state = await self._env.init_state(row, client, "policy", {})
        return await self._env.setup_state(state) or state

    async def _step(self) -> list[dict[str, Any]] | None:
        """The answer to a call; None if a stop condition held when its turn ended."""
        if self._over or (not self._in_turn and await self._env.is_completed(self._state)):
            return None
        self._in_turn = True
        answered = await self._respond()
        self._over = self._state.get("final_env_response") is not None
        return answered

    async def _respond(self) -> list[dict[str, Any]]:
        """The environment's messages after the dialogue so far, which they are appended to."""
        answered = await self._env.env_response(self._messages, self._state)
        normalize = need("verifiers.utils.message_utils", INSTALL).maybe_normalize_messages
        new = normalize(answered, field_name="env_response")
        self._messages += new
        return [message_of(message, self._name) for message in new]

    async def _score(self, state: Any) -> None:
        await self._env.cleanup(state)
        await self._env.rubric.score_rollout(state)
        await self._env.rubric.cleanup(state)

    def _add_step(self, said: Any, prompt: list[Any] | None = None) -> None:
        step = {
            "prompt": list(self._messages if prompt is None else prompt),
            "completion": [said],
            "response": None,
            "tokens": None,
            "reward": None,
            "advantage": None,
            "is_truncated": False,
            "trajectory_id": self._state["trajectory_id"],
            "extras": {},
        }
        self._state["trajectory"].append(step)

    def _replay(self, trajectory: Trajectory) -> None:
        """The package's record of the rollout, from ours: turns with their calls, as the rubric expects them."""
        state, dialogue = self._state, list(self._state["prompt"])
        extras = [step["extras"] for step in state["trajectory"]]
        state["trajectory"] = []
        for number, turn in enumerate(trajectory.turns):
            said, answered = self._turn(turn, number)
            self._add_step(said, dialogue)
            if number < len(extras):
                state["trajectory"][-1]["extras"] = extras[number]
            dialogue += [said, *answered]
        if state["trajectory"]:
            state["trajectory"][-1]["is_truncated"] = trajectory.stop_reason.is_truncated
        state["is_truncated"] = trajectory.stop_reason.is_truncated
        state["is_completed"] = True
        state["completion"] = dialogue[len(state["prompt"]) :]

    def _turn(self, turn: TurnRecord, number: int) -> tuple[Any, list[Any]]:
        """(the assistant's message, the messages after it) of a turn."""
        types = self._types
        calls = [
            types.ToolCall(id=f"call_{number}_{at}", name=call.name, arguments=json.dumps(call.arguments))
            for at, call in enumerate(turn.calls)
        ]
        said = types.AssistantMessage(
            content=turn.content, reasoning_content=turn.reasoning or None, tool_calls=calls or None
        )
        at, followed = 0, []
        for attempt, text in zip(turn.attempts, turn.observations, strict=False):
            is_call = not isinstance(attempt, str)
            id = f"call_{number}_{at}" if is_call else f"malformed_{number}"
            at += is_call
            followed.append(types.ToolMessage(tool_call_id=id, content=text))
        if turn.user is not None:
            followed.append(types.UserMessage(content=turn.user))
        return said, followed


class VerifiersDialogue(Verifiers):
    """An environment that answers turns without calls."""

    def respond(self, text: str) -> str | None:
        """Return the environment's message; None when one of its stop conditions holds."""
        said = self._types.AssistantMessage(content=text)
        self._add_step(said)
        self._messages.append(said)
        try:
            return run(self._answer())
        except PactError:
            raise
        except Exception as error:
            raise PactError(f"env_response of {self._name} failed: {describe_error(error)}") from error

    async def _answer(self) -> str | None:
        if await self._env.is_completed(self._state):
            return None
        answered = await self._respond()
        if self._state.get("final_env_response") is not None:
            return None
        if any(message["role"] != "user" for message in answered):
            raise PactError(
                f"env_response of {self._name} answers a turn without calls by a message of another role than user"
            )
        return cut("\n".join(str(message["content"]) for message in answered))


@functools.cache
def _no_client() -> type:
    """A client of the package that cannot be used: the policy is sampled by this trainer."""
    kind = type("NoClient", (need("verifiers.clients", INSTALL).Client,), {})
    kind.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return kind
