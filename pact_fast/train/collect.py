"""Collecting a step's rollouts: sample, score, exchange → groups with advantages.

Every rank knows the outcome of all rollouts (`Outcome`). The rollouts themselves go to the owner rank of their prompt
(`World.owner_of`), and stay there if they were sampled there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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

NO_VERSION = np.iinfo(np.int64).max  # weight version of a rollout without sampled tokens


class Outcome(NamedTuple):
    """The outcome of a rollout, which every rank knows.

    reward        its reward
    turn_rewards  of its turns, where dynamic sampling asks for them
    sampled       number of sampled tokens
    oldest        oldest weight version that sampled one of them; NO_VERSION: none
    versions      sum of their weight versions
    """

    reward: float
    turn_rewards: tuple[float, ...]
    sampled: int
    oldest: int
    versions: int

    @classmethod
    def of(cls, trajectory: Trajectory, use_turns: bool) -> Outcome:
        versions = trajectory.versions[trajectory.sampled].astype(np.int64)
        turns = tuple(trajectory.turn_rewards) if use_turns else ()
        return cls(trajectory.reward, turns, len(versions), int(versions.min(initial=NO_VERSION)), int(versions.sum()))


@dataclass
class SampledGroup:
    """A prompt of a step and its rollouts, as ranks know them that do not own it.

    task          the task, as its source gives it
    prompt_index  position of the prompt in the step
    trajectories  outcomes of all rollouts
    local         number of a rollout → the rollout, of those that this rank has sampled
    view          task and prompt [n] int64 as the trained side sees them, if this rank has made them already
    """

    task: Task
    prompt_index: int
    trajectories: list[Outcome] = field(default_factory=list)
    local: dict[int, Trajectory] = field(default_factory=dict)
    view: tuple[Task, np.ndarray] | None = None


LocalRollouts = tuple[
    list[SampledGroup], list[Trajectory]
]  # all prompts, no outcomes yet; this rank's rollouts of them


class RolloutCollector:
    """Samples rollouts, scores them and hands them to the owner ranks of their prompts. All ranks must call every method.

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
        outcomes: Of the last step's rollouts, by prompt, on every rank.
    """

    filtered: FilterCounts | None = None
    outcomes: Sequence[Sequence[Outcome]] = ()

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
        """This rank's groups of a step, and the number of all groups that were stale and sampled again.

        Args:
            step: Training step, from 0.
            oldest_version: A group with a token sampled by older weights than this version is stale.
        """
        groups = self._gather_outcomes(self._prefetcher.get(step))
        stale = [i for i, group in enumerate(groups) if any(o.oldest < oldest_version for o in group.trajectories)]
        if stale:
            drawn = self._tasks.train(step, self._config.trainer.prompts_per_step)
            tasks = [drawn[index] for index in stale]
            resampled = self._gather_outcomes(self._prefetcher.run(lambda: self._sample(step, tasks)))
            for index, group in zip(stale, resampled, strict=True):
                group.prompt_index = index
                groups[index] = group
        self.filtered = None
        if self._config.algorithm.filter_groups.enable and self._algorithm.samples(step):
            groups = self._filter(step, groups)
        self.outcomes = [group.trajectories for group in groups]
        return self._all_to_all_rollouts(groups), len(stale)

    def _filter(self, step: int, groups: list[SampledGroup]) -> list[SampledGroup]:
        """Replace groups without signal (algorithm.filter_groups). Every rank has the same outcomes, and decides the same.

        Further groups are sampled after the prefetches that were started, with the newest weights.
        """
        config, trainer = self._config.algorithm.filter_groups, self._config.trainer
        further = FurtherTasks(
            self._tasks,
            FURTHER_BATCHES + step * config.max_num_gen_batches,
            trainer.prompts_per_step,
            {group.task.id for group in groups},
        )

        def sample(tasks: list[Task], first: int) -> list[SampledGroup]:
            return self._gather_outcomes(self._prefetcher.run(lambda: self._sample(step, tasks, first)))

        chosen, self.filtered = filter_groups(groups, sample, further, config, self._algorithm.turn_advantages)
        if self.filtered.without_signal == len(chosen):
            self._progress.note(
                f"step {step + 1}: none of {self.filtered.sampled} groups has a signal (mean reward "
                f"{self.filtered.reward_mean:.2f}); there is nothing to learn in this step; the run continues"
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
        groups = [SampledGroup(task, index) for index, task in enumerate(tasks)]
        if not self._algorithm.samples(step):
            return groups, []
        kept = rollout.num_generations
        started = math.ceil(kept * rollout.oversampling_factor)
        # with oversampling, the rank that cancels a group's slowest rollouts must run the whole group
        local = self._local_jobs(len(groups) * started, started if started > kept else 1)
        resolved = {index: self._view(groups[index]) for index in sorted({position // started for position in local})}
        jobs = [
            Job(
                resolved[position // started],
                (self._config.seed, step, first + position // started, position % started),
                rollout.temperature,
                position // started,
                rollout.filters,
            )
            for position in local
        ]
        kept_groups = [groups[position // started] for position in local if position % started < kept]
        with self._progress.rollouts(len(kept_groups), "rollouts") as advance:
            trajectories = self._loop.run(jobs, lambda *_: advance(), kept)
        self._score([group.view[0] for group in kept_groups if group.view], trajectories, step)
        return groups, trajectories

    def _view(self, group: SampledGroup) -> Task:
        """The group's task as its environment completes it; the trained side's view of it is kept in the group."""
        task, _ = self._loop.resolve_task(group.task)
        group.view = self._loop.trained_view(task)
        return task

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

    def _gather_outcomes(self, sampled: LocalRollouts) -> list[SampledGroup]:
        """The groups with the outcomes of all ranks' rollouts, and this rank's own rollouts in their places."""
        groups, local = sampled
        use_turns = self._algorithm.turn_advantages and self._config.algorithm.filter_groups.enable
        outcomes = [Outcome.of(trajectory, use_turns) for trajectory in local]
        tables = self._world.all_gather(_columns(outcomes), "the outcomes of rollouts")
        everywhere = [outcome for table in tables for outcome in _outcomes(*table)]
        before = sum(len(table[0]) for table in tables[: self._world.rank])
        count = self._config.rollout.num_generations
        for group in groups if everywhere else ():
            group.trajectories = everywhere[group.prompt_index * count : (group.prompt_index + 1) * count]
        for position, trajectory in enumerate(local, before):
            groups[position // count].local[position % count] = trajectory
        return groups

    def _all_to_all_rollouts(self, groups: list[SampledGroup]) -> list[Group]:
        """The groups of this rank's own prompts, with their rollouts and advantages."""
        world, own = self._world, list[SampledGroup]()
        outgoing: list[list[list[object]]] = [[] for _ in range(world.size)]
        for group in groups:
            owner = world.owner_of(group.prompt_index, len(groups))
            if owner == world.rank:
                own.append(group)
            else:
                outgoing[owner] += [[group.prompt_index, k, trajectory] for k, trajectory in group.local.items()]
        for message in world.all_to_all([rollouts or None for rollouts in outgoing], "rollouts"):
            for index, k, trajectory in message or ():
                groups[index].local[k] = trajectory
        return [self._local_group(group) for group in own]

    def _local_group(self, group: SampledGroup) -> Group:
        if group.view is None:
            self._view(group)
        assert group.view is not None
        trajectories = [group.local[k] for k in range(len(group.trajectories))]
        advantages = self._advantages(trajectories) if trajectories else []
        task, prompt_ids = group.view
        return Group(task, group.prompt_index, prompt_ids, trajectories, advantages)

    def _advantages(self, trajectories: list[Trajectory]) -> list[np.ndarray]:
        reward = self._config.algorithm.reward
        return token_advantages(
            trajectories,
            gamma=reward.gamma,
            combine=reward.advantage_combine,
            scale=self._config.algorithm.scale_rewards,
            use_turns=self._algorithm.turn_advantages,
        )


def _columns(outcomes: Sequence[Outcome]) -> list[np.ndarray]:
    """Outcomes as columns: rewards, sampled tokens, oldest versions, sums of versions, turns, rewards of all turns."""
    return [
        np.array([o.reward for o in outcomes], np.float64),
        *(np.array([getattr(o, name) for o in outcomes], np.int64) for name in ("sampled", "oldest", "versions")),
        np.array([len(o.turn_rewards) for o in outcomes], np.int64),
        np.array([reward for o in outcomes for reward in o.turn_rewards], np.float64),
    ]


def _outcomes(
    rewards: np.ndarray,
    sampled: np.ndarray,
    oldest: np.ndarray,
    versions: np.ndarray,
    turns: np.ndarray,
    of_turns: np.ndarray,
) -> list[Outcome]:
    """The inverse of `_columns`."""
    ends, values = np.cumsum(turns).tolist(), of_turns.tolist()
    rows = zip(
        rewards.tolist(), sampled.tolist(), oldest.tolist(), versions.tolist(), turns.tolist(), ends, strict=True
    )
    return [Outcome(reward, tuple(values[end - n : end]), *numbers) for reward, *numbers, n, end in rows]


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
