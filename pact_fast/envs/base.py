"""What an environment is. One instance serves one trajectory at a time; heavy things are shared through the factory."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from pact_fast.data.types import Task, ToolSchema, Trajectory


@runtime_checkable
class Environment(Protocol):
    """The tools of one task.

    `blocking` says whether `call` may take long (a subprocess, a network peer): the agent loop then runs it in a thread while
    other trajectories generate. A cheap, pure environment sets it False and is called in line.
    """

    blocking: bool

    def reset(self, task: Task) -> str | None:
        """Prepare for the task; the returned text, if any, is appended to the user's question."""

    @property
    def tools(self) -> list[ToolSchema]:
        """OpenAI schemas of the tools that the task offers (valid after reset)."""

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run one tool; the observation. Tool failures are observations (text), never exceptions."""

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Named outcome rewards of the finished trajectory; `success` in [0, 1] when the environment can tell."""
