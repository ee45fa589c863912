"""The user's reward functions, called with TRL's keyword signature."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_fast.data.types import Message, Task, Trajectory
from pact_fast.errors import PactError, ShutdownRequested
from pact_fast.plugins import describe_error, load_object
from pact_fast.rewards.shipped import SHIPPED, ShippedReward

RewardFunction = Callable[..., Any]  # returns list[float | None], or a coroutine of one


def load_reward_function(spec: str) -> RewardFunction:
    """The shipped reward of that name, or the function named by `file.py:name` or `module:name`.

    Raises:
        PactError: There is no such callable.
    """
    if ":" not in spec:
        if spec in SHIPPED:
            return SHIPPED[spec]
        names = ", ".join(sorted(SHIPPED))
        raise PactError(f"reward function '{spec}': write file.py:name or module:name, or one of {names}")
    return load_object(spec, "reward function")


def load_reward_functions(specs: Sequence[str]) -> dict[str, RewardFunction]:
    """Reward functions by the name in metrics: the part after the colon, or the whole spec if two specs share it."""
    short = [spec.rpartition(":")[2] for spec in specs]
    return {
        name if short.count(name) == 1 else spec: load_reward_function(spec)
        for name, spec in zip(short, specs, strict=True)
    }


def call_reward_functions(
    functions: Mapping[str, RewardFunction],
    tasks: Sequence[Task],
    trajectories: Sequence[Trajectory],
    messages: Sequence[list[Message]],
    trainer_state: object = None,
) -> list[dict[str, float]]:
    """Rewards by function name, one dict per trajectory.

    Every function is called once. Its keyword arguments are lists with one entry per trajectory: `prompts` and
    `completions` (message lists), `completion_ids` (response token ids, observations included), `answer`, and every
    further column of the data rows (None for rows without it). All are copies. Functions that take them also get
    `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`, which set `Trajectory.extra` and
    `Trajectory.metrics`. If a function returns None for a trajectory, it does not apply to it, and the dict has no such
    key.

    Args:
        functions: The functions by name.
        tasks: The task of each trajectory.
        trajectories: What is scored.
        messages: The messages of each trajectory after the prompt.
        trainer_state: Progress of the run, an object with `global_step` and `max_steps`.

    Raises:
        PactError: A function fails, or does not return one number or None per trajectory.
    """
    rewards: list[dict[str, float]] = [{} for _ in trajectories]
    if not functions:
        return rewards
    columns = {key: None for task in tasks for key in task.columns}
    arguments: dict[str, list[Any]] = {
        **{key: [task.columns.get(key) for task in tasks] for key in columns},
        "answer": [task.answer for task in tasks],
        "prompts": [task.prompt for task in tasks],
        "completions": list(messages),
        "completion_ids": [trajectory.ids.tolist() for trajectory in trajectories],
    }
    logs = _Logs(trajectories)
    progress = {"trainer_state": trainer_state, "log_extra": logs.extra, "log_metric": logs.metric}
    for name, function in functions.items():
        given: dict[str, Any] = {"tasks": tasks, "trajectories": trajectories}
        if not isinstance(function, ShippedReward):
            given = _copies(arguments) | {k: v for k, v in progress.items() if _takes(function, k)}
        for parts, value in zip(rewards, _values(name, function, given, len(trajectories)), strict=True):
            if value is not None:
                parts[name] = value
    logs.store_metrics()
    return rewards


class _Logs:
    """Values that reward functions log during one call for `trajectories`."""

    def __init__(self, trajectories: Sequence[Trajectory]):
        self._trajectories = trajectories
        self._metrics: dict[str, list[float]] = {}

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """TRL's `log_extra`: a column of the recorded rollouts. ValueError unless there is one value per completion."""
        items = list(values)
        if len(items) != len(self._trajectories):
            raise ValueError(f"log_extra({column!r}) got {len(items)} values for {len(self._trajectories)} completions")
        for trajectory, value in zip(self._trajectories, items, strict=True):
            trajectory.extra[str(column)] = _json_value(value)

    def metric(self, name: str, value: float) -> None:
        """TRL's `log_metric`: a scalar, averaged over the step."""
        self._metrics.setdefault(str(name), []).append(float(value))

    def store_metrics(self) -> None:
        """Give every trajectory the means, so that they reach rank 0 with it."""
        means = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        for trajectory in self._trajectories:
            trajectory.metrics |= means


def _json_value(value: Any) -> Any:
    """A copy of the value as JSON data; its text if it is none. Arrays and numpy scalars become lists and numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value)


def _copies(arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Copies that share nothing: neither with the tasks, nor between the rollouts of one prompt."""
    return {name: [copy.deepcopy(entry) for entry in entries] for name, entries in arguments.items()}


def _takes(function: RewardFunction, keyword: str) -> bool:
    """Whether a function has the parameter or takes any keyword."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in function
        return False
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _values(name: str, function: RewardFunction, arguments: dict[str, Any], count: int) -> list[float | None]:
    """Call one function and check its result."""
    try:
        result = function(**arguments)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    except (ShutdownRequested, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PactError(f"reward function '{name}' failed: {describe_error(error)}") from error
    values = result.tolist() if hasattr(result, "tolist") else result  # an array or a tensor
    wanted = f"return a list of {count} numbers or None, one for each completion"
    if not isinstance(values, list | tuple):
        raise PactError(f"reward function '{name}' returned {type(result).__name__}; {wanted}")
    if len(values) != count:
        raise PactError(f"reward function '{name}' returned {len(values)} values; {wanted}")
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise PactError(f"reward function '{name}' returned something that is not a number; {wanted}") from None
