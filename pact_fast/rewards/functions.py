"""User reward functions with TRL's keyword signature."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pact_fast.data.types import Message, Task, Trajectory
from pact_fast.errors import PactError

RewardFunction = Callable[..., Any]  # returns list[float | None], or a coroutine of one


def load_reward_function(spec: str) -> RewardFunction:
    """The function named by `file.py:name` or `module:name`. PactError if there is no such callable."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise PactError(f"reward function '{spec}': write file.py:name or module:name")
    module = _import_file(spec, Path(place)) if place.endswith(".py") else _import_module(spec, place)
    try:
        function = getattr(module, name)
    except AttributeError:
        close = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f"did you mean '{close[0]}'?" if close else "define it there"
        raise PactError(f"reward function '{spec}': {place} has no '{name}'; {hint}") from None
    if not callable(function):
        raise PactError(f"reward function '{spec}': it is a {type(function).__name__}; name a function")
    return function


def load_reward_functions(specs: Sequence[str]) -> dict[str, RewardFunction]:
    """Load several, by the name that metrics show: the part after the colon, or the whole spec where two share it."""
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
) -> list[dict[str, float]]:
    """Rewards by function name, one dict per trajectory.

    `trajectories[i]` is an attempt at `tasks[i]`; `messages[i]` are its messages after the prompt.

    Every function is called once, with lists of one entry per trajectory as keyword arguments: `prompts` and
    `completions` (message lists), `completion_ids` (response token ids, observations included), `answer`, and every
    further column of the data rows (None in rows without it). Where it returns None, the function does not apply and
    the dict has no such key. Raises PactError that names the function if it fails or does not return one number or
    None per trajectory.
    """
    rewards: list[dict[str, float]] = [{} for _ in trajectories]
    if not functions:
        return rewards
    columns = {key: None for task in tasks for key in task.columns}
    arguments = {
        **{key: [task.columns.get(key) for task in tasks] for key in columns},
        "answer": [task.answer for task in tasks],
        "prompts": [task.prompt for task in tasks],
        "completions": list(messages),
        "completion_ids": [trajectory.ids.tolist() for trajectory in trajectories],
    }
    for name, function in functions.items():
        for parts, value in zip(rewards, _values(name, function, arguments, len(trajectories)), strict=True):
            if value is not None:
                parts[name] = value
    return rewards


def _values(name: str, function: RewardFunction, arguments: dict[str, Any], count: int) -> list[float | None]:
    """Call one function and check what it returns."""
    try:
        result = function(**arguments)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    except Exception as error:
        raise PactError(f"reward function '{name}' failed: {_one_line(error)}") from error
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


def _import_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise PactError(f"reward function '{spec}': no file {path}; paths are relative to the current directory")
    # one module per file, so that two functions of a file share its globals
    name = f"pact_fast_user_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PactError(f"reward function '{spec}': {path} cannot be imported: {_one_line(error)}") from error
    return module


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        problem = f"reward function '{spec}': module {name} cannot be imported: {_one_line(error)}"
        raise PactError(f"{problem}; for a file write its path, file.py:name") from error


def _one_line(error: Exception) -> str:
    """`ValueError: message (file.py:12)`; the place is where it was raised, unless that is here."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = frame.filename == __file__ or "importlib" in frame.filename
    return text if ours else f"{text} ({frame.filename}:{frame.lineno})"
