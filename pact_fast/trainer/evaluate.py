"""Held-out evaluation: sampled and greedy success, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from pact_fast.data.types import Task, Trajectory
from pact_fast.rollout.agent import AgentLoop, Job

EVAL_STREAM = 1 << 32  # keeps evaluation's random numbers apart from those of training step 0, 1, …


@dataclass(frozen=True)
class Rate:
    """A success rate with its 95 % Wilson interval."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Rate:
        n = len(values)
        if not n:
            return cls(0.0, 0.0, 1.0, 0)
        p, z = sum(values) / n, 1.959964
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return cls(p, max(0.0, centre - half), min(1.0, centre + half), n)

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def evaluate(
    loop: AgentLoop,
    tasks: list[Task],
    *,
    temperature: float,
    seed: int,
    on_finish: Callable[[int, Trajectory], None] | None = None,
) -> list[Trajectory]:
    """One trajectory per task, rewarded by its environment (reward_parts). Temperature 0 is greedy."""
    trajectories = loop.run(evaluation_jobs(tasks, temperature, seed), on_finish)
    outcome_reward(trajectories)
    return trajectories


def evaluation_jobs(tasks: list[Task], temperature: float, seed: int) -> list[Job]:
    return [Job(task, (seed, EVAL_STREAM, index), temperature) for index, task in enumerate(tasks)]


def outcome_reward(trajectories: list[Trajectory]) -> None:
    for trajectory in trajectories:
        trajectory.reward = trajectory.reward_parts.get("success", 0.0)


def success_rate(trajectories: list[Trajectory]) -> Rate:
    return Rate.of([t.reward_parts.get("success", 0.0) for t in trajectories])


def reward_means(trajectories: list[Trajectory]) -> dict[str, float]:
    keys = sorted({key for t in trajectories for key in t.reward_parts})
    return {key: sum(t.reward_parts.get(key, 0.0) for t in trajectories) / len(trajectories) for key in keys}
