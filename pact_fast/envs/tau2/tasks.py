"""Tasks of the package as tasks of the trainer: splits, prompts, traces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pact_fast.data.types import Task
from pact_fast.envs.tau2.domains import domain, solo_schemas
from pact_fast.envs.tau2.prompts import dialogue_prompt, solo_prompt
from pact_fast.envs.tau2.reference import split_ids, task_by_id
from pact_fast.envs.tau2.traces import REASONING, dialogue_trace, solo_trace
from pact_fast.envs.tau2.users import opening
from pact_fast.envs.tau2.verdict import reward_basis

NAME, SOLO = "tau2", "tau2_solo"  # of the environments


def make_task(name: str, task_id: str, solo: bool) -> Task:
    """One task, with its prompt, tools, expert trace and reference calls.

    Args:
        name: The domain.
        task_id: Id of the task in the package.
        solo: The agent works alone, on the task's ticket.

    Raises:
        PactError: There is no such task, or its reward needs a language model.
    """
    task = task_by_id(name, task_id)
    reward_basis(task)
    trace = solo_trace(task) if solo else dialogue_trace(name, task)
    return Task(
        id=f"{name}{'-solo' if solo else ''}/{task_id}",
        prompt=solo_prompt(name, task) if solo else dialogue_prompt(name, opening(task)),
        tools=tools_of(name, solo),
        expert=trace,
        reference_calls=trace.calls,
        env=SOLO if solo else NAME,
        env_args={"domain": name, "task": task_id},
        columns={"reasoning": REASONING},
    )


def configured_task(name: str, task_id: str, solo: bool) -> Task:
    """As `make_task`; a dialogue is for the environment of the configuration, so that its user is that of `env.args`."""
    task = make_task(name, task_id, solo)
    return task if solo else replace(task, env=None)


@functools.cache
def _tools(name: str, solo: bool) -> list[dict[str, Any]]:
    return solo_schemas(domain(name)) if solo else domain(name).schemas["assistant"]


def tools_of(name: str, solo: bool) -> list[dict[str, Any]]:
    """Tools of the agent. The schemas are shared: do not change them."""
    return list(_tools(name, solo))


def training_ids(name: str, task_set: str) -> list[str]:
    """Ids of the training tasks: the package's training split, or for `full` all tasks that are not in its test split."""
    if task_set == "base" or name != "telecom":
        return split_ids(name, "train")
    held_out = set(held_out_ids(name))
    return [task_id for task_id in split_ids(name, "full") if task_id not in held_out]


def held_out_ids(name: str) -> list[str]:
    """Ids of the held-out tasks: the package's test split, independent of the seed."""
    return split_ids(name, "test")


class PackageTasks:
    """A TaskSource of a domain's tasks; every epoch has its own order, drawn from the seed.

    Args:
        name: The domain.
        task_set: `base` or `full`.
        seed: Seed of the orders.
        make: Makes a task from its id.
    """

    def __init__(self, name: str, task_set: str, seed: int, make: Callable[[str], Task]):
        self._ids, self._held_out = training_ids(name, task_set), held_out_ids(name)
        self._seed, self._make = seed, make

    def train(self, step: int, count: int) -> list[Task]:
        return [self._make(self._id(position)) for position in range(step * count, (step + 1) * count)]

    def held_out(self, count: int) -> list[Task]:
        return [self._make(task_id) for task_id in self._held_out[:count]]

    def _id(self, position: int) -> str:
        epoch, index = divmod(position, len(self._ids))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._ids))
        return self._ids[int(order[index])]
