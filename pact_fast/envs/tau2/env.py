"""The environment `tau2`: one task of τ²-bench, alone on a ticket or with a user."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pact_fast.data.types import Task, ToolSchema, Trajectory
from pact_fast.envs.registry import environment
from pact_fast.envs.tau2.dialogue import Dialogue
from pact_fast.envs.tau2.domains import domain
from pact_fast.envs.tau2.episode import DONE, Episode
from pact_fast.envs.tau2.reference import task_by_id
from pact_fast.envs.tau2.tasks import PackageTasks, configured_task, tools_of
from pact_fast.envs.tau2.users import Role, ScriptedUser, User, user_factory
from pact_fast.envs.tau2.verdict import judge, reward_basis
from pact_fast.errors import DataError, PactError


class Tau2Args(BaseModel):
    """`env.args` of the environment.

    domain    airline, retail or telecom
    solo      telecom: the agent works alone on the task's ticket, with the user's tools as well as its own
    task_set  base: the benchmark's tasks; full: telecom's 2,285 generated ones, of which the test split stays held out
    user      scripted, or `file.py:name`, a function that makes a user from its Role
    """

    model_config = ConfigDict(extra="forbid")

    domain: Literal["airline", "retail", "telecom"] = "telecom"
    solo: bool = False
    task_set: Literal["base", "full"] = "base"
    user: str = "scripted"

    @model_validator(mode="after")
    def _telecom_only(self) -> Tau2Args:
        if self.domain != "telecom" and (self.solo or self.task_set == "full"):
            raise ValueError(f"{self.domain} has neither solo tasks nor a full set; telecom has both")
        return self

    @classmethod
    def read(cls, args: dict[str, Any]) -> Tau2Args:
        """PactError if the arguments do not fit."""
        try:
            return cls(**args)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in ("env.args", *first["loc"]))
            raise PactError(f"{key}: {first['msg']} (docs/tau2.md)") from None


@environment("tau2")
class Tau2:
    """Serves one task at a time. What differs between tasks is in their `env_args`: domain, task, solo.

    Args:
        make_user: Makes the user of a dialogue. The scripted one is fast; others may take long, so the calls of `respond`
            then run in threads.
    """

    def __init__(self, make_user: Callable[[Role], User] = ScriptedUser) -> None:
        self.blocking = make_user is not ScriptedUser
        self._make_user = make_user
        self._episode: Episode | None = None
        self._dialogue: Dialogue | None = None

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Tau2]:
        return functools.partial(cls, user_factory(Tau2Args.read(args).user))

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> PackageTasks:
        read = Tau2Args.read(args)
        make = functools.partial(configured_task, read.domain, solo=read.solo)
        return PackageTasks(read.domain, read.task_set, seed, make)

    @classmethod
    def check_task(cls, task: Task) -> None:
        """DataError if `env_args` names no task of the package."""
        try:
            reward_basis(task_by_id(*_task_of(task)[:2]))
        except DataError:
            raise
        except PactError as error:
            raise DataError(f"task {task.id}: {error}", field="env_args") from None

    def reset(self, task: Task) -> str | None:
        name, task_id, solo = _task_of(task)
        shipped = task_by_id(name, task_id)
        self._dialogue = None if solo else Dialogue(name, shipped, self._make_user)
        self._episode = self._dialogue.episode if self._dialogue else Episode(domain(name), shipped, solo=True)
        return None

    @property
    def episode(self) -> Episode:
        """The episode under way; valid after `reset`."""
        assert self._episode is not None, "reset comes first"
        return self._episode

    @property
    def tools(self) -> list[ToolSchema]:
        return tools_of(self.episode.domain.name, self.episode.solo)

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        return self.episode.call("assistant", name, arguments)

    def respond(self, text: str) -> str | None:
        """The user's answer; None when the dialogue is over. Alone on a ticket, a message to nobody ends the episode."""
        return self._dialogue.respond(text) if self._dialogue else None

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`success`, its components by name in lower case, and `nothing`: what the task pays for doing nothing."""
        episode = self.episode
        if episode.solo and episode.ending == "agent_stop":
            beside = _calls_beside_done(trajectory)
            episode = episode.without_last(beside) if beside else episode
        verdict = judge(episode, [turn.content for turn in trajectory.turns])
        parts = {name.lower(): value for name, value in verdict.components.items()}
        return {"success": verdict.reward, **parts, "nothing": nothing_done(episode.domain.name, episode.task["id"])}


def _calls_beside_done(trajectory: Trajectory) -> int:
    """Calls in the turn of the first `done` that came before it: the package runs no other call of that message."""
    for turn in trajectory.turns:
        names = [call.name for call in turn.calls]
        if DONE in names:
            return names.index(DONE)
    return 0


@functools.cache
def nothing_done(name: str, task_id: str) -> float:
    """The reward of a task in which the agent says and does nothing and the other side ends the episode."""
    episode = Episode(domain(name), task_by_id(name, task_id))
    episode.ending = "user_stop"
    return judge(episode, []).reward


def _task_of(task: Task) -> tuple[str, str, bool]:
    """(domain, id, solo) in the `env_args` of a task. DataError if they are not there."""
    args = task.env_args
    if not isinstance(args.get("task"), str) or not isinstance(args.get("domain"), str):
        raise DataError(
            f"task {task.id}: env_args needs 'domain' (airline, retail, telecom) and 'task', an id of τ²-bench; set env.name "
            "for your data",
            field="env_args",
        )
    solo = args.get("solo") is True
    if solo and args["domain"] != "telecom":
        raise DataError(f"task {task.id}: only telecom has solo tasks", field="env_args")
    return args["domain"], args["task"], solo
