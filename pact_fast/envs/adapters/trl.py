"""The environment `trl`: classes written for the `environment_factory` of TRL's trainers, unchanged."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from pydantic import Field

from pact_fast.data.types import Task, ToolSchema, Trajectory
from pact_fast.envs.adapters.arguments import BadCall
from pact_fast.envs.adapters.background import run
from pact_fast.envs.adapters.callables import FunctionTools, public_methods
from pact_fast.envs.adapters.generated import GeneratedTasks
from pact_fast.envs.adapters.options import Args, episode_seed, read_args
from pact_fast.envs.adapters.results import cut
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.plugins import describe_error, load_object, no_exit

NOT_TOOLS = ("reset", "get_reward")  # methods with a meaning of their own, as in TRL


class TrlArgs(Args):
    """`env.args` of the environment.

    factory  `file.py:Class`, or a function that makes the instance; or {name: such a text}, of which a row's column
             `environment` chooses
    reward   TRL reward functions that take `environments`, `file.py:name` each; others stand in algorithm.reward.functions
    prompt   the question of runs without data, in which `reset` tells the task
    """

    factory: str | dict[str, str]
    reward: list[str] = Field(default_factory=list)
    prompt: str | None = None


@environment("trl")
class Trl:
    """Serves an instance of the class: `reset(**row)`, public methods as tools, `get_reward()`.

    Args:
        factories: What makes an instance, by the value of the column `environment`; "" if there is only one.
        rewards: Functions with TRL's signature.
        timeout: Seconds that a coroutine may take.
    """

    blocking = False
    ordered = True

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Trl]:
        """PactError if a class cannot be loaded, is no environment, or nothing gives a reward."""
        read = read_args(TrlArgs, args)
        named = {"": read.factory} if isinstance(read.factory, str) else read.factory
        factories = {name: load_object(spec, "environment factory") for name, spec in named.items()}
        rewards = [load_object(spec, "reward function") for spec in read.reward]
        waits = [_waits(_instance(make)) for make in factories.values()]
        return functools.partial(cls, factories, rewards, tool_timeout, any(waits))

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> GeneratedTasks:
        """Placeholders, as TRL makes them of an environment that owns its data."""
        read = read_args(TrlArgs, args)
        if not read.prompt:
            raise PactError(
                "data.train is not set; set env.args.prompt to the question that `reset` completes, or data.train"
            )
        return GeneratedTasks("trl", read.prompt, seed)

    def __init__(
        self,
        factories: dict[str, Callable[[], Any]],
        rewards: list[Callable[..., Any]] | None = None,
        timeout: float | None = None,
        blocking: bool = False,
    ):
        self._factories, self._rewards, self._timeout = factories, rewards or [], timeout
        self.blocking = blocking
        self._instances: dict[str, Any] = {}  # made once, reset often
        self._now: Any = None
        self._tools = FunctionTools([])

    def reset(self, task: Task) -> str | None:
        name = "" if "" in self._factories else str(task.columns.get("environment"))
        if name not in self._factories:
            raise PactError(
                f"task {task.id}: its column 'environment' is {name!r}; env.args.factory has {', '.join(self._factories)}"
            )
        if name not in self._instances:
            self._instances[name] = _instance(self._factories[name])
        self._now = self._instances[name]
        self._tools = FunctionTools(public_methods(self._now, NOT_TOOLS))
        row = trl_row(task)
        if name:
            row.pop("environment", None)  # TRL does not forward it, either
        parameters = inspect.signature(self._now.reset).parameters
        if "seed" in parameters:
            row.setdefault("seed", episode_seed(task))
        with no_exit(f"reset of {type(self._now).__name__}"):
            try:
                observation = self._now.reset(**row)
            except TypeError as error:
                raise PactError(
                    f"task {task.id}: reset of {type(self._now).__name__} failed: {describe_error(error)}; it gets the columns "
                    f"{', '.join(row)}, so let it take **kwargs"
                ) from error
        if observation is not None and not isinstance(observation, str):
            raise PactError(
                f"reset of {type(self._now).__name__} returned {type(observation).__name__}; only text is supported, images "
                "are not"
            )
        return observation

    @property
    def tools(self) -> list[ToolSchema]:
        return self._tools.schemas

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The result as TRL shows it: `str` of the method's return value, or of {"error": …}."""
        try:
            result = self._tools.invoke(name, arguments, self._timeout)
            return cut(_shown(result))
        except PactError:
            raise
        except TimeoutError:
            return str({"error": f"the tool did not finish within {self._timeout or 0:g} s"})
        except BadCall as error:
            return str({"error": str(error)})
        except Exception as error:
            return cut(str({"error": str(error)}), 1000)

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`success`: the value of `get_reward`, if there is one; and the values of env.args.reward by their names."""
        values: dict[str, float] = {}
        if callable(getattr(self._now, "get_reward", None)):
            values["success"] = _number("get_reward", _call(self._now.get_reward))
        for function in self._rewards:
            given = _columns(task, trajectory) | {"environments": [self._now]}
            result = _call(function, **given)
            if not isinstance(result, list | tuple) or len(result) != 1:
                raise PactError(
                    f"reward function '{function.__name__}' must return a list with one number per completion"
                )
            if result[0] is not None:
                values[function.__name__] = _number(function.__name__, result[0])
        if "success" not in values and len(self._rewards) == 1 and values:
            values["success"] = next(iter(values.values()))
        return values


def _shown(result: Any) -> str:
    """The text of a result; of content blocks that of their texts, and the kinds of the others."""
    blocks = isinstance(result, list) and result and all(isinstance(part, dict) and "type" in part for part in result)
    if not blocks:
        return str(result)
    return "".join(
        part.get("text", "") if part["type"] == "text" else f"[{part['type']}: not shown]" for part in result
    )


def trl_row(task: Task) -> dict[str, Any]:
    """The row of a task as TRL's dataset has it: its prompt, answer and further columns, copied."""
    row = {"prompt": task.prompt, **task.columns}
    if task.answer is not None:
        row["answer"] = task.answer
    return copy.deepcopy(row)


def _columns(task: Task, trajectory: Trajectory) -> dict[str, Any]:
    """The arguments of a TRL reward function for one completion."""
    row = trl_row(task)
    prompt = row.pop("prompt")
    lists = {name: [value] for name, value in row.items()}
    return {
        **lists,
        "prompts": [prompt],
        "completions": [trajectory.to_messages()],
        "completion_ids": [trajectory.ids.tolist()],
    }


def _call(function: Callable[..., Any], **given: Any) -> Any:
    name = getattr(function, "__name__", repr(function))
    try:
        with no_exit(name):
            result = function(**given)
            return run(_awaited(result)) if inspect.isawaitable(result) else result
    except PactError:
        raise
    except Exception as error:
        raise PactError(f"{name} failed: {describe_error(error)}") from error


async def _awaited(result: Any) -> Any:
    return await result


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise PactError(f"{name} returned {type(value).__name__}; a reward is a number") from None


def _instance(make: Callable[[], Any]) -> Any:
    """A new instance. PactError if it is no environment in TRL's sense, or has no tools."""
    name = getattr(make, "__name__", repr(make))
    try:
        with no_exit(name):
            made = make()
    except TypeError as error:
        raise PactError(f"env.args.factory: {name} cannot be called without arguments: {error}") from None
    if not callable(getattr(made, "reset", None)):
        raise PactError(f"env.args.factory: {type(made).__name__} has no method 'reset'; see docs/adapters.md")
    if not FunctionTools(public_methods(made, NOT_TOOLS)).schemas:
        raise PactError(
            f"env.args.factory: {type(made).__name__} has no public methods beside reset, so there are no tools"
        )
    return made


def _waits(instance: Any) -> bool:
    """Whether one of the tools is async, so that calls run beside the generation of others."""
    return FunctionTools(public_methods(instance, NOT_TOOLS)).is_async
