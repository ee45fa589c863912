"""The reward of a trajectory, per turn and in total (docs/method.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pact_fast.config import RewardConfig
from pact_fast.config.schema import OverlongBufferConfig
from pact_fast.data.absent import is_absent
from pact_fast.data.types import Task, ToolCall, Trajectory
from pact_fast.errors import PactError
from pact_fast.rewards.answers import extract_answer, token_f1
from pact_fast.rewards.matching import match

NO_OUTCOME = "none"  # algorithm.reward.outcome: functions alone are the reward of algorithms without turn-level rewards


def turn_rewards(trajectory: Trajectory, task: Task, penalty: float) -> list[float]:
    """The reward r_t of every assistant turn.

    The calls of the whole trajectory are matched with `task.reference_calls`, or with the expert's calls if those are
    None. A turn earns the mean score of its calls, 0 if it has none; a malformed call scores −penalty, like an
    unmatched one. Without reference calls, calls score 0. If no limit ended the trajectory and the task has an answer,
    the last turn earns their token F1 instead, unless it has calls: then the environment ended the trajectory.
    """
    reference = task.reference_calls
    if reference is None and task.expert is not None:
        reference = task.expert.calls
    if reference is None:
        rewards = [0.0] * len(trajectory.turns)
    else:
        scores = iter(match(trajectory.calls, reference, penalty).tolist())
        rewards = []
        for turn in trajectory.turns:
            earned = [next(scores) if isinstance(a, ToolCall) else 0.0 - penalty for a in turn.attempts]
            rewards.append(sum(earned) / len(earned) if earned else 0.0)
    if not is_absent(task.answer) and not trajectory.stop_reason.is_truncated and not trajectory.turns[-1].attempts:
        rewards[-1] = token_f1(extract_answer(trajectory.answer), str(task.answer))
    return rewards


def score(
    config: RewardConfig,
    task: Task,
    trajectory: Trajectory,
    function_rewards: Mapping[str, float] | None = None,
    *,
    outcome_only: bool = False,
    max_completion_length: int | None = None,
) -> None:
    """Set `turn_rewards`, `reward_parts` and `reward` of a training rollout.

        reward = match_weight · Σ_t r_t + env_weight · outcome + Σ user functions
        reward = outcome + Σ user functions      if outcome_only and the environment returns the outcome

    both less the penalty of `config.overlong_buffer`. The outcome is the environment's `success`, or the reward that
    `config.outcome` names; 0 if that is `none`.

    `reward_parts` holds the unweighted parts: `match` (Σ_t r_t), those of the environment and of the functions.
    `turn_rewards` are unweighted, too.

    Args:
        config: Weights and penalties.
        task: The task of the rollout.
        trajectory: The rollout; its `env_rewards` are set.
        function_rewards: Values of the user's reward functions, by name.
        outcome_only: The algorithm uses no turn-level rewards.
        max_completion_length: Limit of a rollout's tokens, for `overlong_buffer`.

    Raises:
        PactError: A part is not finite, two parts have the same name, or `env_weight` or `outcome` is set and the
            environment returns no such reward.
    """
    env_rewards, functions = trajectory.env_rewards, function_rewards or {}
    trajectory.turn_rewards = turn_rewards(trajectory, task, config.unmatched_penalty)
    parts = {"match": sum(trajectory.turn_rewards), **env_rewards}
    penalty = 0.0
    if config.overlong_buffer.enable and max_completion_length:
        penalty = parts["overlong"] = overlong_penalty(
            len(trajectory.ids), max_completion_length, config.overlong_buffer
        )
    for name in functions.keys() & parts.keys():
        raise PactError(f"reward function '{name}': the name is taken by a built-in reward; rename the function")
    parts |= functions
    for name, value in parts.items():
        if not math.isfinite(value):
            raise PactError(f"task {task.id}: reward '{name}' is {value}; rewards must be finite numbers")
    outcome = config.outcome
    if outcome not in ("success", NO_OUTCOME) and outcome not in env_rewards:
        known = ", ".join(env_rewards) or "none"
        raise PactError(
            f"task {task.id}: its environment gives no '{outcome}' (algorithm.reward.outcome), but: {known}"
        )
    if config.env_weight and outcome not in env_rewards:
        raise PactError(f"task {task.id}: its environment gives no 'success'; set algorithm.reward.env_weight=0")
    trajectory.reward_parts = parts
    if outcome_only and (outcome == NO_OUTCOME or outcome in env_rewards):
        trajectory.reward = env_rewards.get(outcome, 0.0) + sum(functions.values()) + penalty
        return
    trajectory.reward = (
        config.match_weight * parts["match"]
        + config.env_weight * env_rewards.get(outcome, 0.0)
        + sum(functions.values())
        + penalty
    )


def overlong_penalty(tokens: int, limit: int, buffer: OverlongBufferConfig) -> float:
    """DAPO's soft overlong punishment: 0 up to limit − len tokens, then falling linearly to −penalty_factor at the limit.

    Source: arXiv 2503.14476, equation 13.
    """
    beyond = tokens - (limit - buffer.len)
    return -buffer.penalty_factor * min(max(beyond, 0), buffer.len) / buffer.len


def score_evaluation(trajectories: Iterable[Trajectory]) -> None:
    """Set the reward of evaluation rollouts to the environment's `success`, or 0 if it returns none."""
    for trajectory in trajectories:
        trajectory.reward_parts = dict(trajectory.env_rewards)
        trajectory.reward = trajectory.env_rewards.get("success", 0.0)
