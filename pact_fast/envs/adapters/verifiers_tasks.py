"""Environments of the package verifiers: load one, reject unsupported features, and convert its rows to tasks."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pact_fast.data.types import Message, Task, ToolSchema
from pact_fast.envs.adapters.options import need
from pact_fast.errors import PactError
from pact_fast.plugins import describe_error, load_object, no_exit

INSTALL = "'verifiers>=0.2'"
PLACE = "env.args.id"

# Methods of MultiTurnEnv by which an environment may sample or rewrite the dialogue itself
_OWN_LOOP = ("get_prompt_messages", "get_model_response", "add_model_response", "render_completion")


def has_tasksets() -> bool:
    """Whether the package is a release from 0.4 on, which has tasksets in the place of environments.

    Raises:
        PactError: It is missing.
    """
    version = getattr(need("verifiers", INSTALL), "__version__", "0")
    major, minor = (int(part) if part.isdecimal() else 0 for part in [*version.split("."), "0"][:2])
    return (major, minor) >= (0, 4)


def load(id: str, args: dict[str, Any]) -> Any:
    """The environment that `load_environment` returns.

    Args:
        id: Name of an installed environment, or `file.py:load_environment`.
        args: Its arguments.

    Raises:
        PactError: The package or the environment is missing, or a feature is used that cannot be served.
    """
    package = need("verifiers", INSTALL)
    try:
        load_environment = package.load_environment
    except AttributeError as error:
        version = getattr(package, "__version__", "unknown")
        reason = f"lacks a package that it needs ({error.__cause__ or error})"
        raise PactError(f"verifiers {version} cannot be used: it {reason}; pip install {INSTALL}") from None
    try:
        with _kept_signal_handlers(), no_exit(f"the environment {id}"):
            if ".py:" in id:
                found = load_object(id, "verifiers environment")
                if isinstance(found, type):
                    raise PactError(
                        f"{PLACE}: {found.__name__} is a class, not load_environment; tasksets need verifiers>=0.4"
                    )
                made = found(**args)
            else:
                made = load_environment(id, **args)
    except PactError:
        raise
    except Exception as error:
        raise PactError(f"{PLACE}: {id!r} cannot be loaded: {describe_error(error)}") from error
    _check(package, made)
    return made


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """The package's environments replace the handlers of SIGINT and SIGTERM when they are made; a run needs its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _check(package: Any, env: Any) -> None:
    """PactError if the object is no environment, or needs features that a trainer with its own loop cannot provide."""
    base = package.MultiTurnEnv
    name = type(env).__name__
    if not isinstance(env, base):
        raise PactError(
            f"{PLACE}: {name} is no MultiTurnEnv; SingleTurnEnv, MultiTurnEnv, ToolEnv and StatefulToolEnv are supported, "
            "groups of environments and agents are not"
        )
    own = [method for method in _OWN_LOOP if not _is_inherited(package, type(env), method)]
    if own:
        raise PactError(f"{PLACE}: {name} overrides {own[0]}: it asks the model itself, or rewrites the dialogue")
    if env.rubric.has_group_rewards:
        raise PactError(
            f"{PLACE}: a reward function of {name} compares the rollouts of a group; here each is scored when it ends"
        )
    if env.rubric.has_advantages:
        raise PactError(f"{PLACE}: the rubric of {name} computes advantages itself; set algorithm.name instead")
    if env.message_type != "chat":
        raise PactError(f"{PLACE}: {name} continues plain text; only chat messages are supported")


def _is_inherited(package: Any, kind: type, method: str) -> bool:
    """Whether a method is one of the package's plain environments."""
    plain = (package.MultiTurnEnv, package.SingleTurnEnv)
    return any(getattr(kind, method) is getattr(one, method) for one in plain)


class DatasetTasks:
    """A TaskSource of the environment's own dataset: training rows in order, epoch after epoch; its evaluation rows.

    Raises PactError if the environment has no rows to train on.
    """

    def __init__(self, env: Any, name: str):
        self._env, self._name = env, name
        # both are built when first asked for, which may take long
        self._rows = env.build_dataset()
        if self._rows is None or not len(self._rows):
            raise PactError(f"{PLACE}: {name} has no dataset to train on; set data.train")
        self._eval = env.build_eval_dataset()

    def train(self, step: int, count: int) -> list[Task]:
        return [self._task(self._rows, "train", at) for at in range(step * count, (step + 1) * count)]

    def held_out(self, count: int) -> list[Task]:
        return [self._task(self._eval, "eval", at) for at in range(min(count, len(self._eval or ())))]

    def _task(self, rows: Any, split: str, position: int) -> Task:
        index = position % len(rows)
        return task_of_row(rows[index], f"{self._name}-{split}-{index}")


def task_of_row(row: dict[str, Any], id: str) -> Task:
    """A row of the package's dataset as a task; the whole row is kept in `env_args`."""
    answer = row.get("answer")
    return Task(
        id=id,
        prompt=[message_of(message, id) for message in row["prompt"]],
        answer=None if answer in (None, "") else str(answer),
        env_args={"row": {key: value for key, value in row.items() if key != "prompt" and value is not None}},
    )


def row_of_task(task: Task) -> dict[str, Any]:
    """The input of a rollout in the package's form, from a task of its dataset or of a data file."""
    kept = task.env_args.get("row")
    row = dict(kept) if isinstance(kept, dict) else dict(task.columns)
    row.setdefault("answer", task.answer or "")
    row.setdefault("example_id", 0)
    return {**row, "prompt": task.prompt}


def message_of(message: Any, id: str) -> Message:
    """A message of the package, or of its dataset, as plain data. PactError if it holds more than text."""
    data = message if isinstance(message, dict) else message.model_dump(exclude_none=True)
    content = data.get("content") or ""
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise PactError(f"task {id}: a message holds an image or a sound; only text is supported")
        content = "".join(part["text"] for part in content)
    return {**{key: value for key, value in data.items() if value is not None}, "content": content}


def schema_of(tool: Any) -> ToolSchema:
    """A tool of the package as an OpenAI schema."""
    parameters = json.loads(json.dumps(tool.parameters))
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }
