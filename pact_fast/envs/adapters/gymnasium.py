"""The environment `gymnasium`: text environments with reset and step, of the package gymnasium."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from pact_fast.data.types import Task, ToolSchema, Trajectory
from pact_fast.envs.adapters.arguments import BadCall, known_arguments
from pact_fast.envs.adapters.generated import GeneratedTasks
from pact_fast.envs.adapters.options import Args, episode_seed, need, read_args
from pact_fast.envs.adapters.results import cut
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.plugins import describe_error, load_object, no_exit

PARAMETERS = {
    "type": "object",
    "properties": {"action": {"type": "string", "description": "The action."}},
    "required": ["action"],
}
ACT: ToolSchema = {
    "type": "function",
    "function": {"name": "act", "description": "Take one action.", "parameters": PARAMETERS},
}


class GymnasiumArgs(Args):
    """`env.args` of the environment.

    id        a registered id, `module:id` to import a module first, or `file.py:Class`
    kwargs    arguments of the environment
    action    text: every message of the policy is an action; tool: it calls act(action)
    prompt    the question of runs without data, to which the first observation is appended
    blocking  steps may take long and run in threads
    """

    id: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    action: Literal["text", "tool"] = "text"
    prompt: str = "Play. Say one action at a time, and nothing else."
    blocking: bool = False


@environment("gymnasium")
class Gymnasium:
    """One episode, with actions by the tool `act`.

    Args:
        make: Makes the environment of the package.
        blocking: Steps may take long.
    """

    ordered = True

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Gymnasium]:
        """PactError if the package or the environment is missing, or its actions are no text."""
        read = read_args(GymnasiumArgs, args)
        make = _maker(read)
        probe = make()
        try:
            _check_actions(probe)
        finally:
            probe.close()
        kind = GymnasiumDialogue if read.action == "text" else Gymnasium
        return functools.partial(kind, make, read.blocking)

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> GeneratedTasks:
        """The same question with another seed each."""
        read = read_args(GymnasiumArgs, args)
        return GeneratedTasks(read.id.rpartition(":")[2], read.prompt, seed)

    def __init__(self, make: Callable[[], Any], blocking: bool = False):
        self.blocking = blocking
        self._make = make
        self._env: Any = None
        self._total, self._over = 0.0, False
        self._success: float | None = None

    def reset(self, task: Task) -> str | None:
        """The first observation. The seed is that of the task."""
        if self._env is None:
            self._env = self._make()
            weakref.finalize(self, self._env.close)
        self._total, self._over, self._success = 0.0, False, None
        with no_exit("reset"):
            observation, _ = self._env.reset(seed=episode_seed(task), options=task.env_args.get("options"))
        return _text(observation, "reset")

    @property
    def tools(self) -> list[ToolSchema]:
        return [ACT]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if name != "act":
            return f"error: there is no tool {name[:60]!r}; the tools are: act"
        try:
            action = known_arguments(name, arguments, PARAMETERS)["action"]
        except BadCall as error:
            return f"error: {error}"
        return self.step(action)

    def finished(self) -> bool:
        """Whether the episode was terminated or truncated."""
        return self._over

    def step(self, text: Any) -> str:
        """Take an action and return the observation. An invalid action returns an error and takes no step."""
        if self._over:
            return "error: the episode is over"
        try:
            action = _action(text, self._env.action_space)
        except BadCall as error:
            return f"error: {error}"
        try:
            with no_exit("step"):
                observation, reward, terminated, truncated, info = self._env.step(action)
        except PactError:
            raise
        except Exception as error:  # of the environment, by an action that it does not expect
            return f"error: {describe_error(error)[:200]}"
        self._total += float(reward)
        self._over = bool(terminated or truncated)
        if "success" in info:
            self._success = float(info["success"])
        return _text(observation, "step")

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`return`: the sum of the rewards. `success`: the last `info["success"]`, else the return cut to [0, 1]."""
        success = min(max(self._total, 0.0), 1.0) if self._success is None else self._success
        return {"success": success, "return": self._total}


class GymnasiumDialogue(Gymnasium):
    """One episode, with the messages of the policy as actions."""

    @property
    def tools(self) -> list[ToolSchema]:
        return []

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        return "error: there are no tools; say the action"

    def respond(self, text: str) -> str | None:
        """The observation after the action `text`; None when the episode is over."""
        if self._over:
            return None
        seen = self.step(text.strip())
        return None if self._over else seen


def _maker(read: GymnasiumArgs) -> Callable[[], Any]:
    gymnasium = need("gymnasium", "gymnasium")
    if ".py:" in read.id:
        cls = load_object(read.id, "environment")
        return functools.partial(_made, lambda: cls(**read.kwargs), read.id)
    # the checker warns about every observation that is no array
    make = functools.partial(gymnasium.make, read.id, disable_env_checker=True, **read.kwargs)
    return functools.partial(_made, make, read.id)


def _made(make: Callable[[], Any], id: str) -> Any:
    try:
        with no_exit(f"the environment {id}"):
            return make()
    except PactError:
        raise
    except Exception as error:
        raise PactError(f"env.args.id: {id!r} cannot be made: {describe_error(error)}") from None


def _check_actions(env: Any) -> None:
    spaces = need("gymnasium.spaces", "gymnasium")
    if not isinstance(env.action_space, spaces.Text | spaces.Discrete):
        raise PactError(
            f"env.args.id: the actions of {type(env.unwrapped).__name__} are {type(env.action_space).__name__}; a policy "
            "writes Text, or the number of a Discrete action; wrap others in an ActionWrapper"
        )


def _action(text: Any, space: Any) -> Any:
    """The action that a text names. BadCall if it is none."""
    if not isinstance(text, str):
        raise BadCall(f"an action is a text, not {type(text).__name__}")
    if hasattr(space, "n"):  # Discrete
        try:
            action: Any = int(text.strip()[:20])
        except ValueError:
            numbers = f"{space.start} to {space.start + space.n - 1}"
            raise BadCall(f"{text.strip()[:60]!r} is no action; say a number from {numbers}") from None
    else:
        action = text
    try:
        allowed = bool(space.contains(action))
    except (OverflowError, ValueError, TypeError):
        allowed = False
    if not allowed:
        shown = repr(str(action)[:60])
        raise BadCall(f"{shown} is not among the actions, {str(space)[:120]}")
    return action


def _text(observation: Any, where: str) -> str:
    if not isinstance(observation, str):
        raise PactError(
            f"{where} returned an observation of type {type(observation).__name__}; wrap the environment in an "
            "ObservationWrapper that returns text"
        )
    return cut(observation)
