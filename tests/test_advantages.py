"""Group, turn and token advantages, against hand-computed cases."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.data.types import Trajectory, TurnRecord
from pact_fast.rewards.advantages import group_advantages, token_advantages, turn_advantages, turn_returns


def rollout(reward: float, turn_rewards: list[float], turn_ids: list[int], sampled: list[int]) -> Trajectory:
    n = len(turn_ids)
    return Trajectory(
        task_id="t",
        prompt_ids=np.zeros(1, np.int64),
        ids=np.zeros(n, np.int64),
        components=np.zeros(n, np.uint8),
        turn_ids=np.array(turn_ids, np.int16),
        sampled=np.array(sampled, bool),
        logprobs=np.zeros(n, np.float32),
        versions=np.zeros(n, np.int32),
        turns=[TurnRecord("", "", "") for _ in turn_rewards],
        stop_reason="answer",
        turn_rewards=turn_rewards,
        reward=reward,
    )


def test_group_advantages_by_hand() -> None:
    # mean 2, population variance (1 + 0 + 0 + 1) / 4
    std = math.sqrt(0.5)
    expected = [-1 / (std + 1e-6), 0, 0, 1 / (std + 1e-6)]
    np.testing.assert_allclose(group_advantages([1, 2, 2, 3]), expected, rtol=1e-14)
    np.testing.assert_allclose(group_advantages([1, 2, 2, 3], scale=False), [-1, 0, 0, 1], rtol=1e-14)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_group_advantages_follow_the_formula(rewards: list[float]) -> None:
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    if max(rewards) - min(rewards) > 1e-7:
        np.testing.assert_allclose(group_advantages(rewards), [(r - mean) / (std + 1e-6) for r in rewards], atol=1e-7)


@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_exactly_zero(scale: bool) -> None:
    for rewards in ([0.1] * 3, [0.7], [], [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.6], [1e6 / 3, 1e6 / 3 * (1 + 1e-15)]):
        assert not group_advantages(rewards, scale).any(), rewards
    assert len(set(map(np.float64, [0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1]))) == 2  # the case is a real one


def test_small_differences_are_still_differences() -> None:
    assert group_advantages([1.0, 1.00001])[1] > 0.8


def test_turn_returns_are_discounted_from_the_end() -> None:
    np.testing.assert_allclose(turn_returns([1, 0, 2], 0.5), [1 + 0.25 * 2, 1, 2], rtol=1e-15)
    assert turn_returns([1, 2, 3], 0).tolist() == [1, 2, 3]
    assert turn_returns([], 0.9).tolist() == []


def test_turn_advantages_compare_rollouts_at_the_same_turn() -> None:
    # returns with γ = 0.5: [2, 2], [1], [0.5, 1, 0]
    first, second, third = turn_advantages([[1, 2], [1], [0, 1, 0]], gamma=0.5, scale=False)
    mean = (2 + 1 + 0.5) / 3
    np.testing.assert_allclose(first, [2 - mean, 0.5], rtol=1e-14)
    np.testing.assert_allclose(second, [1 - mean], rtol=1e-14)
    np.testing.assert_allclose(third, [0.5 - mean, -0.5, 0], rtol=1e-14)
    scaled = turn_advantages([[1, 2], [1], [0, 1, 0]], gamma=0.5)
    std = statistics.pstdev([2, 1, 0.5])
    np.testing.assert_allclose([a[0] for a in scaled], [(r - mean) / (std + 1e-6) for r in (2, 1, 0.5)], rtol=1e-14)


def test_a_turn_of_one_rollout_has_no_advantage() -> None:
    advantages = turn_advantages([[1, 5, 7], [1]], gamma=0.0)
    assert [a.tolist() for a in advantages] == [[0, 0, 0], [0]]
    assert [a.tolist() for a in turn_advantages([[3.0, 4.0]], gamma=0.9, scale=False)] == [[0, 0]]
    assert turn_advantages([], gamma=0.9) == []


def test_token_advantages_add_the_two_levels_on_generated_tokens() -> None:
    # two turns with an observation between them; a rollout of one turn
    rollouts = [
        rollout(3.0, [1.0, 2.0], [0, 0, 0, 1, 1], [1, 1, 0, 1, 0]),
        rollout(1.0, [0.0], [0, 0], [1, 0]),
    ]
    # A^g = ±1; returns of turn 0 with γ = 0.5: 2 and 0, so A^ℓ = ±1; turn 1 stands alone
    tokens = token_advantages(rollouts, gamma=0.5, scale=False)
    assert [t.tolist() for t in tokens] == [[2, 2, 0, 1, 0], [-2, 0]]
    assert all(t.dtype == np.float32 for t in tokens)
    mean = token_advantages(rollouts, gamma=0.5, combine="mean", scale=False)
    assert [t.tolist() for t in mean] == [[1, 1, 0, 0.5, 0], [-1, 0]]
    outcome = token_advantages(rollouts, gamma=0.5, combine="mean", scale=False, use_turns=False)
    assert [t.tolist() for t in outcome] == [[1, 1, 0, 1, 0], [-1, 0]]
    scaled = token_advantages(rollouts, gamma=0.5)
    np.testing.assert_allclose(scaled[0], [2 / (1 + 1e-6), 2 / (1 + 1e-6), 0, 1 / (1 + 1e-6), 0], rtol=1e-6)


def test_an_all_equal_group_has_no_token_advantage() -> None:
    rollouts = [
        rollout(0.6, [0.1, 0.2, 0.3], [0, 1, 2], [1, 1, 1]),
        rollout(0.6, [0.1, 0.2, 0.3], [0, 1, 2], [1, 1, 1]),
    ]
    assert not np.concatenate(token_advantages(rollouts, 0.9)).any()
