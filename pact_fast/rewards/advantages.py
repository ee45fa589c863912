"""Advantages from rewards: over the rollouts of a prompt, and over their turns (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pact_fast.data.types import Trajectory

EPSILON = 1e-6
# Relative tolerance below which rewards count as equal, because they may be one sum in another order. Dividing their
# difference by EPSILON would turn rounding into a training signal, and cost a backward pass.
EQUAL_TOLERANCE = 1e-9


def group_advantages(rewards: Sequence[float] | np.ndarray, scale: bool = True) -> np.ndarray:
    """A_k = (R_k − mean) / (std + 1e-6), float64 [K], from rewards [K]. Without `scale`, R_k − mean.

    std is the population standard deviation (ddof = 0), defined for any K. Rewards that are equal within a relative
    tolerance of 1e-9 give exactly 0.
    """
    values = np.asarray(rewards, np.float64)
    if not len(values) or np.ptp(values) <= EQUAL_TOLERANCE * max(1.0, np.abs(values).max()):
        return np.zeros(len(values))
    centred = values - values.mean()
    return centred / (values.std() + EPSILON) if scale else centred


def turn_returns(rewards: Sequence[float], gamma: float) -> np.ndarray:
    """Discounted returns R^ℓ_t = Σ_{u≥t} γ^{u−t} r_u, float64 [T], of one rollout's turn rewards [T]."""
    returns = np.zeros(len(rewards))
    following = 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * following
        returns[t] = following
    return returns


def turn_advantages(turn_rewards: Sequence[Sequence[float]], gamma: float, scale: bool = True) -> list[np.ndarray]:
    """Turn advantages A^ℓ, one float64 [T_k] per rollout, from the turn rewards [T_k] of K rollouts.

    For every turn t, the discounted returns of the rollouts that have a turn t are normalised by `group_advantages`. A
    turn that only one rollout has gets 0, as there is nothing to compare it with.
    """
    returns = [turn_returns(rewards, gamma) for rewards in turn_rewards]
    advantages = [np.zeros(len(values)) for values in returns]
    for t in range(max(map(len, returns), default=0)):
        reached = [k for k, values in enumerate(returns) if len(values) > t]
        normalised = group_advantages([returns[k][t] for k in reached], scale)
        for k, advantage in zip(reached, normalised, strict=True):
            advantages[k][t] = advantage
    return advantages


def token_advantages(
    trajectories: Sequence[Trajectory],
    gamma: float,
    combine: Literal["sum", "mean"] = "sum",
    scale: bool = True,
    use_turns: bool = True,
) -> list[np.ndarray]:
    """Advantage of every response token, float32 [n] per rollout of a prompt; 0 for tokens that were not sampled.

    Args:
        trajectories: The rollouts of one prompt; reads `reward`, `turn_rewards`, `turn_ids` and `sampled`.
        gamma: Discount of the turn returns.
        combine: `sum`: A^g_k + A^ℓ_{k,t} for the tokens of turn t; `mean`: half of that.
        scale: Divide by the standard deviation.
        use_turns: False: A^g_k alone, for all sampled tokens.
    """
    group = group_advantages([trajectory.reward for trajectory in trajectories], scale)
    per_turn = turn_advantages([trajectory.turn_rewards for trajectory in trajectories], gamma, scale)
    result = []
    for trajectory, a_group, a_turn in zip(trajectories, group, per_turn, strict=True):
        tokens = np.zeros(len(trajectory.ids), np.float32)
        tokens[trajectory.sampled] = a_group
        if use_turns:
            tokens[trajectory.sampled] += a_turn[trajectory.turn_ids[trajectory.sampled]]
            if combine == "mean":
                tokens /= 2
        result.append(tokens)
    return result
