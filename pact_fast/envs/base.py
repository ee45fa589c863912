"""The Environment protocol. One instance serves one trajectory at a time; instances share resources via a factory."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, runtime_checkable

from pact_fast.data.types import Task, ToolSchema, Trajectory


@runtime_checkable
class Environment(Protocol):
    """Runs the tools of one task and scores its trajectory. How it is made: see `envs/registry.py`.

    blocking  whether `call` may take long (a subprocess, the network). If so, the agent loop calls it in a thread while
              other trajectories generate; otherwise in line.

    Optional attributes:

    ordered      true where the calls of one turn depend on each other: they then run one after another, also in threads
    needs_tools  false where tasks without tools are as they should be (`pact-fast doctor`)
    finished()   asked after the calls of a turn of the policy: whether they have ended the episode
    """

    blocking: bool

    def reset(self, task: Task) -> str | None:
        """Prepare for the task. The returned text, if any, is appended to the user's question."""

    @property
    def tools(self) -> list[ToolSchema]:
        """OpenAI schemas of the tools of the task; valid after reset."""

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run one tool and return the observation. A tool that fails returns a text, it never raises."""

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Outcome rewards of the finished trajectory by name; `success` in [0, 1] if the environment can decide it."""


class ConversationalEnvironment(Environment, Protocol):
    """An environment with a user: an episode continues after a turn without tool calls until the environment ends it.

    `tools` may change between turns. The loop reads it after every reply; calls of later turns are checked against the
    new list. How the policy learns of it is up to the environment: the prompt stands, so the reply has to say it.
    """

    def respond(self, text: str) -> str | None:
        """The next message of the user, or None when the episode is over. Must not raise.

        Asked after every turn that the policy ended without a tool call. In a thread, if the environment is `blocking`.

        Args:
            text: The visible text of the turn, without reasoning; may be empty.
        """


def has_user(env: object) -> TypeGuard[ConversationalEnvironment]:
    """Whether an environment, or a class of environments, has a user."""
    return callable(getattr(env, "respond", None))


def is_finished(env: object) -> bool:
    """Whether the calls of a turn have ended the episode, in an environment that can tell."""
    ask = getattr(env, "finished", None)
    return bool(ask()) if callable(ask) else False
