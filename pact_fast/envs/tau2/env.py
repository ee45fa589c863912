"""The environments `tau2` and `tau2_solo`: one task of τ²-bench, with a user or alone on a ticket."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pact_fast.data.types import StopReason, Task, ToolSchema, Trajectory
from pact_fast.envs.registry import environment
from pact_fast.envs.tau2.dialogue import Dialogue
from pact_fast.envs.tau2.domains import domain
from pact_fast.envs.tau2.episode import DONE, Episode
from pact_fast.envs.tau2.reference import task_by_id
from pact_fast.envs.tau2.tasks import PackageTasks, configured_task, tools_of
from pact_fast.envs.tau2.users import ENDINGS, Role, Tau2ScriptedUser, User, user_factory
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


class _Tau2Environment(ABC):
    """Base class of both environments. Serves one task at a time, given by `env_args`: domain and task id."""

    blocking = False
    solo: ClassVar[bool]

    def __init__(self) -> None:
        self._episode: Episode | None = None

    @classmethod
    def tasks(cls, args: dict[str, Any], seed: int) -> PackageTasks:
        read = Tau2Args.read(args)
        make = functools.partial(configured_task, read.domain, solo=cls.solo or read.solo)
        return PackageTasks(read.domain, read.task_set, seed, make)

    @classmethod
    def check_task(cls, task: Task) -> None:
        """DataError if `env_args` names no task of the package."""
        try:
            reward_basis(task_by_id(*cls._task(task)))
        except DataError:
            raise
        except PactError as error:
            raise DataError(f"task {task.id}: {error}", field="env_args") from None

    def reset(self, task: Task) -> str | None:
        self._episode = self._start(*self._task(task))
        return None

    @abstractmethod
    def _start(self, name: str, task_id: str) -> Episode:
        """The episode of a task, begun."""

    @property
    def episode(self) -> Episode:
        """The episode under way; valid after `reset`."""
        assert self._episode is not None, "reset comes first"
        return self._episode

    @property
    def tools(self) -> list[ToolSchema]:
        return tools_of(self.episode.domain.name, self.solo)

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        return self.episode.call("assistant", name, arguments)

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`success`, its components by name in lower case, and `nothing`: the reward of doing nothing."""
        episode = self.episode
        if self.solo and episode.ending == "agent_stop":
            beside = _calls_beside_done(trajectory)
            episode = episode.without_last(beside) if beside else episode
        verdict = judge(episode, [turn.content for turn in trajectory.turns])
        parts = {name.lower(): value for name, value in verdict.components.items()}
        return {"success": verdict.reward, **parts, "nothing": nothing_done(episode.domain.name, episode.task["id"])}

    @classmethod
    def _task(cls, task: Task) -> tuple[str, str]:
        """(domain, id) in the `env_args` of a task. DataError if they are not there."""
        name, task_id = task.env_args.get("domain"), task.env_args.get("task")
        if not isinstance(task_id, str) or not isinstance(name, str):
            raise DataError(
                f"task {task.id}: env_args needs 'domain' (airline, retail, telecom) and 'task', an id of τ²-bench; set "
                "env.name for your data",
                field="env_args",
            )
        if cls.solo and name != "telecom":
            raise DataError(f"task {task.id}: {name} has no solo tasks; name the environment tau2", field="env_args")
        return name, task_id


@environment("tau2_solo")
class Tau2Solo(_Tau2Environment):
    """Telecom, the agent alone on a ticket. There is no user: a message without a call ends the episode."""

    solo = True

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Tau2Solo]:
        Tau2Args.read(args)
        return cls

    def _start(self, name: str, task_id: str) -> Episode:
        return Episode(domain(name), task_by_id(name, task_id), solo=True)


@environment("tau2")
class Tau2(_Tau2Environment):
    """A domain with a user.

    Args:
        make_user: Makes the user of a dialogue. The scripted one is fast; others may take long, so that `respond` then runs
            in a thread.
    """

    solo = False
    user_stops = ENDINGS  # of a policy or model that plays the user, as of all users of this environment

    def __init__(self, make_user: Callable[[Role], User] = Tau2ScriptedUser) -> None:
        super().__init__()
        self.blocking = make_user is not Tau2ScriptedUser
        self._make_user = make_user
        self._dialogue: Dialogue | None = None

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Tau2]:
        return functools.partial(cls, user_factory(Tau2Args.read(args).user))

    def _start(self, name: str, task_id: str) -> Episode:
        self._dialogue = Dialogue(name, task_by_id(name, task_id), self._make_user)
        return self._dialogue.episode

    def respond(self, text: str) -> str | None:
        """The user's answer; None when the dialogue is over."""
        assert self._dialogue is not None, "reset comes first"
        return self._dialogue.respond(text)

    def user_prompt(self) -> str:
        """The package's prompt of its user simulator, for `rollout.user`."""
        assert self._dialogue is not None, "reset comes first"
        return self._dialogue.role.prompt()

    @property
    def user_tools(self) -> list[ToolSchema]:
        return domain(self.episode.domain.name).schemas["user"]

    def call_as_user(self, name: str, arguments: dict[str, Any]) -> str:
        return self.episode.call("user", name, arguments)

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """As of every task; a policy or model that plays the user has ended it if the trajectory says so."""
        if trajectory.stop_reason is StopReason.USER and self.episode.ending is None:
            self.episode.ending = "user_stop"
        return super().reward(task, trajectory)


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
