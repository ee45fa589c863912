"""Dynamic sampling (DAPO, arXiv 2503.14476): which groups have no signal, and how many further ones to sample.

A group whose rewards are all equal has advantages of zero and teaches nothing. Such groups are dropped, and groups of
further prompts are sampled in their place: never more than `max_num_gen_batches` batches in a step, so that a step ends
whatever the policy can do. If the bound is reached first, dropped groups fill the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from pact_fast.config.schema import FilterGroupsConfig
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task

# Most superfluous groups of a step, relative to those that it cannot do without. Sampling only as many as are missing would
# leave none over, but takes many small rounds.
MAX_SUPERFLUOUS = 0.3
# Number of the first batch of further prompts, beyond the last step of any run, and not of this run: a run that is resumed
# with more steps sees the same prompts.
FURTHER_BATCHES = 1 << 24


class RolloutRewards(Protocol):
    """A rollout, or its summary: its reward, and those of its turns."""

    @property
    def reward(self) -> float: ...

    @property
    def turn_rewards(self) -> Sequence[float]: ...


class ScoredGroup(Protocol):
    """A prompt and its scored rollouts."""

    task: Task
    prompt_index: int

    @property
    def trajectories(self) -> Sequence[RolloutRewards]: ...


G = TypeVar("G", bound=ScoredGroup)


@dataclass(frozen=True)
class FilterCounts:
    """Counts and mean rewards of a step's filtering.

    sampled          groups that were sampled
    dropped          of these, groups without signal
    rounds           rounds of further groups
    without_signal   groups without signal that fill the step
    reward_mean      mean reward of all groups that were sampled
    dropped_reward   mean reward of the groups without signal; NaN: there are none
    """

    sampled: int
    dropped: int
    rounds: int
    without_signal: int
    reward_mean: float
    dropped_reward: float

    def metrics(self) -> dict[str, float]:
        """For the step's record; a mean of nothing is left out."""
        values = {
            "filter/groups_sampled": float(self.sampled),
            "filter/groups_dropped": float(self.dropped),
            "filter/rounds": float(self.rounds),
            "filter/groups_without_signal": float(self.without_signal),
            "filter/reward_mean_sampled": self.reward_mean,
            "filter/reward_mean_dropped": self.dropped_reward,
        }
        return {name: value for name, value in values.items() if not math.isnan(value)}


def has_signal(group: ScoredGroup, config: FilterGroupsConfig, use_turns: bool) -> bool:
    """Whether a group has a learning signal: its rewards differ, and its mean reward is below the limit.

    Args:
        group: A group with its rollouts, scored.
        config: The limit, if there is one.
        use_turns: Rewards of turns count, too.
    """
    rewards = [(t.reward, *(t.turn_rewards if use_turns else ())) for t in group.trajectories]
    if len(set(rewards)) < 2:
        return False
    limit = config.max_mean_reward
    return limit is None or float(np.mean([t.reward for t in group.trajectories])) < limit


def further_groups(missing: int, kept: int, sampled: int, budget: int) -> int:
    """Return the number of groups to sample next: at least the missing ones, more if few groups have a signal.

    Args:
        missing: Groups that the step still lacks.
        kept: Groups with a signal so far.
        sampled: Groups sampled so far.
        budget: Groups that may still be sampled.
    """
    needed = int(missing * (sampled + 2) / (kept + 1))  # by the yield so far, and one success of two before it
    # in the worst case every further group has a signal: all beyond `missing` are then superfluous
    return min(budget, max(missing, min(needed, missing + int(MAX_SUPERFLUOUS * (sampled + missing)))))


class FurtherTasks:
    """Prompts beyond those of the steps, a function of the step alone, so that a resumed run sees the same.

    They are taken from the steps after the end of all runs (data files go round). Prompts that the step has used are passed
    over as long as there are others in the batch: a group that was dropped would probably be dropped again.

    Args:
        tasks: The task source.
        first: Number of the first batch, different for every step.
        count: Prompts of a batch.
        used: Ids of prompts that the step has used.
    """

    def __init__(self, tasks: TaskSource, first: int, count: int, used: set[str]):
        self._tasks, self._next, self._count, self._used = tasks, first, count, used
        self._pool: list[Task] = []

    def take(self, count: int) -> list[Task]:
        """The next `count` prompts."""
        taken: list[Task] = []
        while len(taken) < count:
            if not self._pool:
                batch = self._tasks.train(self._next, self._count)
                self._next += 1
                self._pool = [task for task in batch if task.id not in self._used] or list(batch)
            taken.append(self._pool.pop(0))
            self._used.add(taken[-1].id)
        return taken


def filter_groups(
    groups: list[G],
    sample: Callable[[list[Task], int], list[G]],
    further: FurtherTasks,
    config: FilterGroupsConfig,
    use_turns: bool,
) -> tuple[list[G], FilterCounts]:
    """The groups of a step, those without signal replaced as far as the bound allows. As many as before.

    Args:
        groups: The first batch, scored.
        sample: (prompts, position of the first among all of the step) → their groups, scored.
        further: Further prompts.
        config: The bound, and the definition of a group without signal.
        use_turns: Rewards of turns count, too.
    """
    wanted = len(groups)
    everything, rounds = list(groups), 0
    kept = [group for group in everything if has_signal(group, config, use_turns)]
    while len(kept) < wanted:
        budget = wanted * config.max_num_gen_batches - len(everything)
        count = further_groups(wanted - len(kept), len(kept), len(everything), budget)
        if count < 1:
            break
        found = sample(further.take(count), len(everything))
        everything += found
        kept += [group for group in found if has_signal(group, config, use_turns)]
        rounds += 1
    without = [group for group in everything if not any(group is other for other in kept)]
    chosen = [*kept[:wanted], *without[: max(0, wanted - len(kept))]]
    for index, group in enumerate(chosen):
        group.prompt_index = index
    counts = FilterCounts(
        sampled=len(everything),
        dropped=len(without),
        rounds=rounds,
        without_signal=max(0, wanted - len(kept)),
        reward_mean=_mean_reward(everything),
        dropped_reward=_mean_reward(without),
    )
    return chosen, counts


def _mean_reward(groups: Sequence[ScoredGroup]) -> float:
    rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
    return float(np.mean(rewards)) if rewards else math.nan
