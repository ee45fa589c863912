"""Rollouts of a step → groups with rewards and advantages, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pact_fast.algorithms.base import Algorithm, Group
from pact_fast.config import Config
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task, Trajectory
from pact_fast.distributed.world import World
from pact_fast.rewards.advantages import token_advantages
from pact_fast.rewards.functions import RewardFunction, call_reward_functions
from pact_fast.rewards.score import score
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.train.prefetch import RolloutPrefetcher
from pact_fast.train.progress import Progress

Sampled = tuple[list[Group], list[Trajectory]]  # all prompts of a step, and this rank's rollouts of them


class RolloutCollector:
    """Samples, scores and exchanges rollouts. Every rank calls every method.

    Args:
        config: The run's configuration.
        tasks: Prompts by step.
        loop: The agent loop of this rank.
        algorithm: Says whether rollouts are needed, and which kind of advantages.
        reward_functions: The user's, by name.
        samplers: Ranks that have an engine.
        world: All ranks.
        progress: Shows the rollouts of this rank.
    """

    def __init__(
        self,
        config: Config,
        tasks: TaskSource,
        loop: AgentLoop,
        algorithm: Algorithm,
        reward_functions: Mapping[str, RewardFunction],
        samplers: list[int],
        world: World,
        progress: Progress,
    ):
        self._config, self._tasks, self._loop, self._algorithm = config, tasks, loop, algorithm
        self._reward_functions, self._samplers, self._world, self._progress = (
            reward_functions,
            samplers,
            world,
            progress,
        )
        trainer = config.trainer
        self._prefetcher = RolloutPrefetcher(self._sample, trainer.max_steps, trainer.max_off_policy_steps)

    def collect(self, step: int, oldest_version: int) -> tuple[list[Group], int]:
        """The groups of a step, and how many of them were sampled again.

        Args:
            step: From 0.
            oldest_version: Prompts with a token sampled by older weights than these are sampled again.
        """
        groups = self._all_gather(self._prefetcher.get(step))
        stale = [i for i, group in enumerate(groups) if _oldest(group, oldest_version) < oldest_version]
        if stale:
            tasks = [groups[index].task for index in stale]
            again = self._all_gather(self._prefetcher.run(lambda: self._sample(step, tasks)))
            for index, group in zip(stale, again, strict=True):
                group.prompt_index = index
                groups[index] = group
        return groups, len(stale)

    def run_jobs(self, jobs: list[Job], name: str) -> list[Trajectory]:
        """Sample `jobs` on all ranks, in their order; waits for rollouts that are under way."""

        def run() -> list[Trajectory]:
            mine = [jobs[place] for place in self._local_jobs(len(jobs))]
            with self._progress.rollouts(len(mine), name) as advance:
                return self._loop.run(mine, lambda index, trajectory: advance())

        parts = self._world.all_gather(self._prefetcher.run(run), name)
        return [trajectory for part in parts for trajectory in part]

    def close(self) -> None:
        """Start no further rollouts; those under way end by themselves."""
        self._prefetcher.close()

    def _sample(self, step: int, tasks: list[Task] | None = None) -> Sampled:
        """The prompts of the step (or `tasks`), and this rank's rollouts of them, scored."""
        rollout = self._config.rollout
        if tasks is None:
            tasks = self._tasks.train(step, self._config.trainer.prompts_per_step)
        tasks = [self._loop.resolve_task(task)[0] for task in tasks]
        groups = [Group(task, index, self._loop.prompt_ids(task)) for index, task in enumerate(tasks)]
        if not self._algorithm.needs_rollouts:
            return groups, []
        keep = rollout.num_generations
        started = math.ceil(keep * rollout.oversampling_factor)
        jobs = [
            Job(group.task, (self._config.seed, step, group.prompt_index, k), rollout.temperature, group.prompt_index)
            for group in groups
            for k in range(started)
        ]
        # a rank that cancels the slowest of a group must have the whole group
        local = self._local_jobs(len(jobs), started if started > keep else 1)
        tasks = [jobs[place].task for place in local if place % started < keep]
        with self._progress.rollouts(len(tasks), "rollouts") as advance:
            trajectories = self._loop.run([jobs[place] for place in local], lambda *_: advance(), keep)
        self._score(tasks, trajectories)
        return groups, trajectories

    def _local_jobs(self, jobs: int, unit: int = 1) -> range:
        """Places of this rank's jobs: a block, so that rollouts of one prompt share a prefix cache.

        `unit` neighbours stay together.
        """
        if self._world.rank not in self._samplers:
            return range(0)
        index, count, units = self._samplers.index(self._world.rank), len(self._samplers), jobs // unit
        return range(index * units // count * unit, (index + 1) * units // count * unit)

    def _score(self, tasks: list[Task], trajectories: list[Trajectory]) -> None:
        messages = [trajectory.to_messages() for trajectory in trajectories]
        functions = call_reward_functions(self._reward_functions, tasks, trajectories, messages)
        outcome_only = not self._algorithm.turn_advantages
        for task, trajectory, rewards in zip(tasks, trajectories, functions, strict=True):
            score(self._config.algorithm.reward, task, trajectory, rewards, outcome_only=outcome_only)

    def _all_gather(self, sampled: Sampled) -> list[Group]:
        """The groups with the rollouts of all ranks, and their advantages."""
        groups, local = sampled
        trajectories = [t for part in self._world.all_gather(local, "rollouts") for t in part]
        count = self._config.rollout.num_generations
        for group in groups if trajectories else ():
            group.trajectories = trajectories[group.prompt_index * count : (group.prompt_index + 1) * count]
            group.advantages = self._advantages(group.trajectories)
        return groups

    def _advantages(self, trajectories: list[Trajectory]) -> list[np.ndarray]:
        reward = self._config.algorithm.reward
        return token_advantages(
            trajectories,
            gamma=reward.gamma,
            combine=reward.advantage_combine,
            scale=self._config.algorithm.scale_rewards,
            use_turns=self._algorithm.turn_advantages,
        )


def _oldest(group: Group, default: int) -> int:
    """The oldest version of the weights that sampled a token of the group."""
    oldest = [int(t.versions[t.sampled].min(initial=default)) for t in group.trajectories]
    return min(oldest, default=default)
