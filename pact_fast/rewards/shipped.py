"""Rewards that `algorithm.reward.functions` names without a file: functions of a task and a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pact_fast.data.types import Task, Trajectory
from pact_fast.rewards.ftrl import ftrl_reward
from pact_fast.rewards.toolrl import toolrl_reward


@dataclass(frozen=True)
class ShippedReward:
    """A reward as a reward function of `tasks` and `trajectories`. None: it does not apply to a trajectory."""

    reward: Callable[[Task, Trajectory], float | None]

    def __call__(self, tasks: Sequence[Task], trajectories: Sequence[Trajectory]) -> list[float | None]:
        """The reward of every trajectory."""
        return [self.reward(task, trajectory) for task, trajectory in zip(tasks, trajectories, strict=True)]


SHIPPED = {"ftrl": ShippedReward(ftrl_reward), "toolrl": ShippedReward(toolrl_reward)}
