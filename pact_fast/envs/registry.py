"""The registry of environments, and the environments and tasks that a configuration asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pact_fast.config import Config, DataConfig, EnvConfig
from pact_fast.data.sources import FileTasks, TaskSource
from pact_fast.data.types import Task
from pact_fast.envs.base import Environment
from pact_fast.errors import PactError
from pact_fast.registry import Registry

# A registered class makes one environment per trajectory: `cls(**env.args)`, or what its class method
# `factory(args, tool_timeout)` returns where trajectories share something heavy. A class that generates its own
# tasks has a class method `tasks(args, seed) -> TaskSource`.
environment: Registry[Any] = Registry("environment", "env.name", "pact_fast.envs")


class EnvironmentFactory:
    """Makes the environment of a task: the one its row names in the column `env`, else that of the configuration.

    A row may name only a registered environment, never a file: data must not choose which code is imported.
    """

    def __init__(self, config: Config):
        self._default = environment_name(config.env, config.data)
        self._args = {self._default: config.env.args}
        self._tool_timeout = config.rollout.tool_timeout
        self._factories: dict[str, Callable[[], Environment]] = {}
        self._factory(self._default)  # a wrong name or argument is an error now, not at the first rollout

    def __call__(self, task: Task) -> Environment:
        """A new environment for `task`, not yet reset. PactError if its row names an environment that does not exist."""
        name = task.env or self._default
        if name not in self._factories and name not in environment.names():
            raise PactError(
                f"task {task.id}: its column 'env' names '{name}'; registered environments are "
                f"{', '.join(environment.names())} (one of your own is named in env.name)"
            )
        return self._factory(name)()

    def _factory(self, name: str) -> Callable[[], Environment]:
        if name not in self._factories:
            self._factories[name] = _make_factory(name, self._args.get(name, {}), self._tool_timeout)
        return self._factories[name]


def environment_name(env: EnvConfig, data: DataConfig) -> str:
    """The environment of tasks that name none: `auto` is python_tools with data files, lookup_chain without."""
    if env.name != "auto":
        return env.name
    return "python_tools" if data.train else "lookup_chain"


def make_tasks(config: Config) -> TaskSource:
    """Tasks of the data files, or those that the environment generates. PactError if there are neither."""
    if config.data.train:
        return FileTasks(config.data, config.seed)
    name = environment_name(config.env, config.data)
    generate = getattr(environment.get(name), "tasks", None)
    if generate is None:
        raise PactError(f"data.train is not set, and env.name={name} generates no tasks: name a JSONL or parquet file")
    return generate(config.env.args, config.seed)


def _make_factory(name: str, args: dict[str, Any], tool_timeout: float) -> Callable[[], Environment]:
    cls = environment.get(name)
    if hasattr(cls, "factory"):
        return cls.factory(args, tool_timeout)
    try:
        cls(**args)
    except TypeError as error:
        raise PactError(f"env.args do not fit env.name={name}: {error}") from None
    return functools.partial(cls, **args)
