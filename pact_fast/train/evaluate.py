"""Held-out evaluation: sampled and greedy success rates with 95 % Wilson intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pact_fast.config import Config
from pact_fast.config.filters import UNFILTERED, SamplingFilters
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task, Trajectory
from pact_fast.distributed.world import World
from pact_fast.report.console import rollout_table
from pact_fast.rewards.score import score_evaluation
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.metrics import MetricsWriter
from pact_fast.train.progress import Progress
from pact_fast.train.records import RolloutWriter

EVAL_STREAM = 1 << 32  # takes the place of the training step in random seeds, so that the two never coincide


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of an evaluation, with one rollout per task. Temperature 0 is greedy and ignores `filters`."""

    temperature: float
    filters: SamplingFilters = UNFILTERED

    def to_json(self) -> dict[str, float | int]:
        return {"temperature": self.temperature, **self.filters.to_json()}

    def __str__(self) -> str:
        """`greedy`, or `sampled at temperature 0.7, top-p 0.9`."""
        return f"sampled at temperature {self.temperature:g}, {self.filters}" if self.temperature else "greedy"


def evaluation_kinds(config: Config) -> dict[str, Sampling]:
    """The two evaluations: `sampled` as training rollouts are, and `greedy`."""
    rollout = config.rollout
    return {"sampled": Sampling(rollout.temperature, rollout.filters), "greedy": Sampling(0.0)}


@dataclass(frozen=True)
class Rate:
    """A success rate of n trials with its 95 % Wilson interval [low, high]."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Rate:
        """The mean of `values` in [0, 1] (Wilson 1927, JASA 22, 209-212)."""
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
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.n else "no outcome"


class Evaluator:
    """Evaluates the policy on held-out tasks during a run. All ranks must call it.

    Args:
        config: The run's configuration.
        tasks: Source of the held-out tasks.
        collector: Distributes the rollouts over ranks.
        metrics: Where results are written; None on ranks other than 0.
        records: Writer of sampled rollouts.
        progress: Shows results and some rollouts.
        world: All ranks.
    """

    def __init__(
        self,
        config: Config,
        tasks: TaskSource,
        collector: RolloutCollector,
        metrics: MetricsWriter | None,
        records: RolloutWriter,
        progress: Progress,
        world: World,
    ):
        self._config, self._tasks, self._collector = config, tasks, collector
        self._metrics, self._records, self._progress, self._world = metrics, records, progress, world

    def evaluate(self, step: int, label: str) -> dict[str, Any] | None:
        """Evaluate once. Returns rates as JSON, "success" (sampled as training rollouts are) and "greedy".

        Each states its temperature, top_p, top_k, min_p and number of samples ("n").

        Args:
            step: Training step for the metrics.
            label: Name for the progress display.

        Returns:
            None if there are no held-out tasks, or none of them has an outcome.
        """
        trainer = self._config.trainer
        tasks = self._tasks.held_out(trainer.eval_tasks)
        if not tasks:
            return None
        rates: dict[str, Rate] = {}
        kinds = evaluation_kinds(self._config)
        kinds = {"success": kinds["sampled"], "greedy": kinds["greedy"]}
        values: dict[str, float] = {"eval/tasks": float(len(tasks))}
        values |= {f"eval/{key}": value for key, value in kinds["success"].to_json().items()}
        for name, sampling in kinds.items():
            jobs = evaluation_jobs(tasks, sampling, self._config.seed)
            trajectories = self._collector.run_jobs(jobs, f"{label}: {name}")
            score_evaluation(trajectories)
            rates[name] = success_rate(trajectories)
            means = reward_means(trajectories)
            values |= {f"eval/{name}": rates[name].mean} if rates[name].n else {}
            values |= {f"eval/{name}/{key}": value for key, value in means.items() if key != "success"}
            if name == "success" and self._world.is_main:
                records = self._records.write_evaluation(step, tasks, trajectories)
                if records and trainer.log_completions:
                    self._progress.print(rollout_table(records, limit=trainer.log_completions))
        if self._metrics:
            self._metrics.write(step, values)
        shown = ", ".join(f"{kinds[name]} {rate}" for name, rate in rates.items())
        self._progress.note(f"{label} at step {step} ({len(tasks)} tasks, one sample each): {shown}")
        if not rates["success"].n:
            return None
        return {name: {**rate.to_json(), **kinds[name].to_json()} for name, rate in rates.items()}


def evaluate(
    loop: AgentLoop,
    tasks: list[Task],
    *,
    sampling: Sampling,
    seed: int,
    on_finish: Callable[[int, Trajectory], None] | None = None,
) -> list[Trajectory]:
    """One trajectory per task, scored by its environment only.

    Args:
        loop: The agent loop that samples.
        tasks: Evaluation tasks.
        sampling: Temperature and filters.
        seed: Seed of the run.
        on_finish: Called with (index, trajectory) whenever one has ended.
    """
    trajectories = loop.run(evaluation_jobs(tasks, sampling, seed), on_finish)
    score_evaluation(trajectories)
    return trajectories


def evaluation_jobs(tasks: list[Task], sampling: Sampling, seed: int) -> list[Job]:
    """One job per task, with random numbers that depend on seed and position alone."""
    return [
        Job(task, (seed, EVAL_STREAM, index), sampling.temperature, filters=sampling.filters)
        for index, task in enumerate(tasks)
    ]


def success_rate(trajectories: list[Trajectory]) -> Rate:
    """Mean of the environment's `success`, over the trajectories of tasks that have one."""
    return Rate.of([t.reward_parts["success"] for t in trajectories if "success" in t.reward_parts])


def reward_means(trajectories: list[Trajectory]) -> dict[str, float]:
    """Mean of every reward part by name, over the trajectories that it applies to."""
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for key, value in trajectory.reward_parts.items():
            values.setdefault(key, []).append(value)
    return {key: sum(values[key]) / len(values[key]) for key in sorted(values)}
