"""The registry of environments, and the environments and tasks that a configuration asks for.

A registered class is used in one of two ways:

- `cls(**env.args)` makes the environment of one trajectory; or
- its class method `factory(args, tool_timeout)` returns the function that makes it, where trajectories share something
  expensive, such as a process pool. If the environments have a method `close`, it is called once, at the end of a run, on
  one of them: it ends what they share, also while calls are under way, which must then end soon.

A class that generates its own tasks also has a class method `tasks(args, seed) -> TaskSource`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pact_fast.config import Config, DataConfig, EnvConfig
from pact_fast.data.sources import FileTasks, TaskSource
from pact_fast.data.types import Task
from pact_fast.envs.base import Environment
from pact_fast.errors import PactError
from pact_fast.plugins import no_exit
from pact_fast.registry import Registry, did_you_mean

environment: Registry[Any] = Registry("environment", "env.name", "pact_fast.envs")


class EnvironmentFactory:
    """Makes the environment of a task: the one that its column `env` names, else that of the configuration.

    A row may name only a registered environment, never a file: data must not choose which code is imported.
    `env.args` are for the environment of the configuration; any other one gets none.

    Raises:
        PactError: `env.name` is unknown, or `env.args` do not fit it.
    """

    def __init__(self, config: Config):
        self._default = environment.get(environment_name(config.env, config.data))
        self._tool_timeout = config.rollout.tool_timeout
        self._last_made: dict[Any, Environment] = {}
        self._factories = {self._default: _make_factory(self._default, config.env.args, self._tool_timeout)}

    def __call__(self, task: Task) -> Environment:
        """A new environment for `task`, not yet reset. PactError if its row names one that is not registered."""
        cls = self._registered(task) if task.env else self._default
        if cls not in self._factories:
            self._factories[cls] = _make_factory(cls, {}, self._tool_timeout)
        made = self._last_made[cls] = self._factories[cls]()
        return made

    def close(self) -> None:
        """Close the shared resources of each environment class, such as process pools. Running calls end at once."""
        for made in self._last_made.values():
            close = getattr(made, "close", None)
            if callable(close):
                close()

    def _registered(self, task: Task) -> Any:
        known = environment.names()
        if task.env not in known:
            raise PactError(
                f"task {task.id}: its column 'env' names {task.env!r}, which is not registered"
                f"{did_you_mean(str(task.env), known)}; registered: {', '.join(known)}; a row cannot name a file; set "
                "env.name to file.py:Class for a class of your own"
            )
        return environment.get(str(task.env))


def is_built_in(cls: type) -> bool:
    """Whether an environment is one of this package. Others get copies of tasks, because they may change them."""
    return cls.__module__.startswith("pact_fast.")


def environment_name(env: EnvConfig, data: DataConfig) -> str:
    """The environment of tasks that name none: `auto` is python_tools with data files, lookup_chain without."""
    if env.name != "auto":
        return env.name
    return "python_tools" if data.train else "lookup_chain"


def make_tasks(config: Config) -> TaskSource:
    """Tasks of the data files, or those that the environment generates.

    Raises:
        PactError: There are neither, or `env.name` is unknown.
        DataError: A row of a file is wrong, or names an environment that is not registered.
    """
    name = environment_name(config.env, config.data)
    cls = environment.get(name)  # before the data is read: importing it may register names that rows use
    if config.data.train:
        return FileTasks(config.data, config.seed, environment.names())
    generate = getattr(cls, "tasks", None)
    if generate is None:
        raise PactError(
            f"data.train is not set, and env.name={name} generates no tasks: name a file, or a dataset of the Hub"
        )
    with no_exit(f"the environment {name}"):
        return generate(config.env.args, config.seed)


def _make_factory(cls: Any, args: dict[str, Any], tool_timeout: float) -> Callable[[], Environment]:
    what = f"the environment {cls.__name__}"
    if hasattr(cls, "factory"):
        with no_exit(what):
            return cls.factory(args, tool_timeout)
    try:
        with no_exit(what):
            made = cls(**args)
    except TypeError as error:
        raise PactError(f"env.args do not fit the environment {cls.__name__}: {error}") from None
    missing = [name for name in ("blocking", "reset", "tools", "call", "reward") if not _has(made, name)]
    if missing:
        raise PactError(f"environment {cls.__name__} lacks {', '.join(missing)}; see docs/environments.md")
    return functools.partial(cls, **args)


def _has(made: object, name: str) -> bool:
    """Whether an instance has the attribute; a property is not evaluated, since `tools` is valid only after reset."""
    return hasattr(type(made), name) or name in getattr(made, "__dict__", {})
