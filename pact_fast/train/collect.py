"""Collecting a step's rollouts: sample, score, all-gather → groups with advantages, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from transformers import TrainerState

from pact_fast.algorithms.base import Algorithm, Group
from pact_fast.config import Config
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task, Trajectory
from pact_fast.distributed.world import World
from pact_fast.rewards.advantages import token_advantages
from pact_fast.rewards.functions import RewardFunction, call_reward_functions
from pact_fast.rewards.score import score
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.train.filter_groups import FURTHER_BATCHES, FilterCounts, FurtherTasks, filter_groups
from pact_fast.train.prefetch import RolloutPrefetcher
from pact_fast.train.progress import Progress

LocalRollouts = tuple[list[Group], list[Trajectory]]  # groups of all prompts, still empty; this rank's rollouts of them


class RolloutCollector:
    """Samples rollouts, scores them and gathers them on all ranks. All ranks must call every method.

    Args:
        config: The run's configuration.
        tasks: Source of the prompts of a step.
        loop: The agent loop of this rank.
        algorithm: States whether rollouts are needed, and which advantages.
        reward_functions: The user's reward functions by name.
        samplers: Ranks that have an engine.
        world: All ranks.
        progress: Progress display for the rollouts of this rank.

    Attributes:
        filtered: What dynamic sampling did in the last step; None: it is off.
    """

    filtered: FilterCounts | None = None

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
        self._reward_functions, self._progress = reward_functions, progress
        self._samplers, self._world = samplers, world
        trainer = config.trainer
        self._prefetcher = RolloutPrefetcher(self._sample, trainer.max_steps, trainer.max_off_policy_steps)

    def collect(self, step: int, oldest_version: int) -> tuple[list[Group], int]:
        """The groups of a step, and the number of stale groups that were sampled again.

        Args:
            step: Training step, from 0.
            oldest_version: A group with a token sampled by older weights than this version is stale.
        """
        groups = self._all_gather(self._prefetcher.get(step))
        stale = [i for i, group in enumerate(groups) if _oldest(group, oldest_version) < oldest_version]
        if stale:
            drawn = self._tasks.train(step, self._config.trainer.prompts_per_step)
            tasks = [drawn[index] for index in stale]
            resampled = self._all_gather(self._prefetcher.run(lambda: self._sample(step, tasks)))
            for index, group in zip(stale, resampled, strict=True):
                group.prompt_index = index
                groups[index] = group
        self.filtered = None
        if self._config.algorithm.filter_groups.enable and self._algorithm.samples(step):
            groups = self._filter(step, groups)
        return groups, len(stale)

    def _filter(self, step: int, groups: list[Group]) -> list[Group]:
        """Replace groups without signal (algorithm.filter_groups). Every rank has the same groups, and decides the same.

        Further groups are sampled after the prefetches that were started, with the newest weights.
        """
        config, trainer = self._config.algorithm.filter_groups, self._config.trainer
        further = FurtherTasks(
            self._tasks,
            FURTHER_BATCHES + step * config.max_num_gen_batches,
            trainer.prompts_per_step,
            {group.task.id for group in groups},
        )

        def sample(tasks: list[Task], first: int) -> list[Group]:
            return self._all_gather(self._prefetcher.run(lambda: self._sample(step, tasks, first)))

        chosen, self.filtered = filter_groups(groups, sample, further, config, self._algorithm.turn_advantages)
        if self.filtered.without_signal == len(chosen):
            self._progress.note(
                f"step {step + 1}: none of {self.filtered.sampled} groups has a signal (mean reward "
                f"{self.filtered.reward_mean:.2f}); there is nothing to learn in this step, and the run goes on"
            )
        return chosen

    def run_jobs(self, jobs: list[Job], name: str) -> list[Trajectory]:
        """Distribute `jobs` over all ranks; returns their trajectories in order. Prefetched rollouts finish first."""

        def run() -> list[Trajectory]:
            local = [jobs[position] for position in self._local_jobs(len(jobs))]
            with self._progress.rollouts(len(local), name) as advance:
                return self._loop.run(local, lambda index, trajectory: advance())

        parts = self._world.all_gather(self._prefetcher.run(run), name)
        return [trajectory for part in parts for trajectory in part]

    def close(self) -> None:
        """Start no further rollouts; running ones finish in the background."""
        self._prefetcher.close()

    def _sample(self, step: int, tasks: list[Task] | None = None, first: int = 0) -> LocalRollouts:
        """Groups of the step's prompts (or of `tasks`), and this rank's rollouts of them, scored.

        `first`: position of the first prompt among all of the step, which the random numbers depend on.
        """
        rollout = self._config.rollout
        if tasks is None:
            tasks = self._tasks.train(step, self._config.trainer.prompts_per_step)
        tasks = [self._loop.resolve_task(task)[0] for task in tasks]
        views = [self._loop.trained_view(task) for task in tasks]
        groups = [Group(view, index, ids) for index, (view, ids) in enumerate(views)]
        if not self._algorithm.samples(step):
            return groups, []
        kept = rollout.num_generations
        started = math.ceil(kept * rollout.oversampling_factor)
        jobs = [
            Job(
                tasks[group.prompt_index],
                (self._config.seed, step, first + group.prompt_index, k),
                rollout.temperature,
                group.prompt_index,
                rollout.filters,
            )
            for group in groups
            for k in range(started)
        ]
        # with oversampling, the rank that cancels a group's slowest rollouts must run the whole group
        local = self._local_jobs(len(jobs), started if started > kept else 1)
        kept_tasks = [groups[jobs[position].group].task for position in local if position % started < kept]
        with self._progress.rollouts(len(kept_tasks), "rollouts") as advance:
            trajectories = self._loop.run([jobs[position] for position in local], lambda *_: advance(), kept)
        self._score(kept_tasks, trajectories, step)
        return groups, trajectories

    def _local_jobs(self, jobs: int, unit: int = 1) -> range:
        return local_jobs(jobs, unit, self._world.rank, self._samplers)

    def _score(self, tasks: list[Task], trajectories: list[Trajectory], step: int) -> None:
        """Fill in the rewards of rollouts of `step` (from 0); `tasks` has one entry per trajectory."""
        messages = [trajectory.to_messages() for trajectory in trajectories]
        state = TrainerState(global_step=step, max_steps=self._config.trainer.max_steps)
        functions = call_reward_functions(self._reward_functions, tasks, trajectories, messages, state)
        outcome_only, limit = not self._algorithm.turn_advantages, self._config.rollout.max_completion_length
        for task, trajectory, rewards in zip(tasks, trajectories, functions, strict=True):
            score(
                self._config.algorithm.reward, task, trajectory, rewards, outcome_only=outcome_only,
                max_completion_length=limit,
            )  # fmt: skip

    def _all_gather(self, sampled: LocalRollouts) -> list[Group]:
        """The groups, filled with the rollouts of all ranks and their advantages."""
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
    """Oldest weight version that sampled a token of the group, or `default` without tokens."""
    oldest = [int(t.versions[t.sampled].min(initial=default)) for t in group.trajectories]
    return min(oldest, default=default)


def local_jobs(jobs: int, unit: int, rank: int, samplers: list[int]) -> range:
    """Positions of a rank's jobs: one block, so that rollouts of a prompt share a prefix cache.

    Args:
        jobs: Number of jobs of all ranks, a multiple of `unit`.
        unit: Consecutive jobs that stay on one rank.
        rank: The rank.
        samplers: Ranks that have an engine; others get no jobs.
    """
    if rank not in samplers:
        return range(0)
    index, count, units = samplers.index(rank), len(samplers), jobs // unit
    return range(index * units // count * unit, (index + 1) * units // count * unit)
