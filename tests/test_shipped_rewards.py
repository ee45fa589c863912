"""Rewards from the literature: by hand, against brute force, and by name in the settings."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.config import RewardConfig, load_config
from pact_fast.config.schema import OverlongBufferConfig
from pact_fast.data.types import ExpertTrace, ExpertTurn, StopReason, Task, ToolCall, Trajectory, TurnRecord
from pact_fast.errors import PactError
from pact_fast.rewards.ftrl import ftrl_reward
from pact_fast.rewards.functions import call_reward_functions, load_reward_functions
from pact_fast.rewards.score import overlong_penalty, score
from pact_fast.rewards.toolrl import correctness, toolrl_reward
from pact_fast.train.preflight import check_settings


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


def rollout(*attempts: ToolCall | str, answer: str = "42", stop: StopReason = StopReason.ANSWER, tokens: int = 0):
    none = np.zeros(tokens, np.int64)
    turns = [TurnRecord("", "", "", [attempt], ["ok"]) for attempt in attempts] + [TurnRecord("", "", answer)]
    return Trajectory("t", none, none, none, none, none, none, none, turns, stop)


def task(*reference: ToolCall) -> Task:
    return Task("t", [{"role": "user", "content": "q"}], reference_calls=list(reference))


F, G = call("f", a=1, b=2), call("g")


@pytest.mark.parametrize(
    ("predicted", "reference", "share"),
    [
        ([F, G], [G, F], 1.0),  # in any order
        ([F], [F, G], (1 / 2 + 3) / 5),
        ([F, F], [F], (1 / 2 + 3) / 4),
        ([call("f", a=1, b=9)], [F], (1 + 1 + 1) / 4),
        ([call("f", a=1, c=3)], [F], (1 + 1 / 3 + 1) / 4),
        ([call("f")], [F], 1 / 4),
        ([call("h")], [F], 0.0),
        ([], [F], 0.0),
        ([G, call("g", x=1)], [G], (1 / 2 + 1) / 2),
        ([call("f", a=True, b=2.0)], [F], (1 + 1 + 1) / 4),  # as JSON values
    ],
)
def test_correctness_of_toolrl_by_hand(predicted: list[ToolCall], reference: list[ToolCall], share: float) -> None:
    assert correctness(predicted, reference) == pytest.approx(6 * share - 3, abs=1e-15)


def test_toolrl_matches_calls_so_that_the_reward_is_largest() -> None:
    """Every order of the predicted calls, matched one after the other, is tried; a greedy matching would lose some."""
    rng = random.Random(0)
    greedy_loses = 0
    for _ in range(60):
        predicted, reference = (
            [call("f", **{k: rng.randrange(2) for k in rng.sample("abc", rng.randrange(4))}) for _ in range(n)]
            for n in (3, 2)
        )
        largest = 1 + sum(1 + len(r.arguments) for r in reference)
        values = [
            (2 / 3 + sum(max(0.0, pair(p, r)) for p, r in zip(order, reference, strict=False))) / largest
            for order in itertools.permutations(predicted)
        ]
        assert correctness(predicted, reference) == pytest.approx(6 * max(values) - 3)
        greedy_loses += values[0] < max(values)
    assert greedy_loses


def pair(p: ToolCall, r: ToolCall) -> float:
    got, want = p.arguments, r.arguments
    names = len(got.keys() & want.keys()) / max(len(got.keys() | want.keys()), 1) if got or want else 1.0
    return names + sum(k in got and got[k] == v for k, v in want.items())


def test_format_of_toolrl_is_one_for_readable_calls_and_an_answer() -> None:
    assert toolrl_reward(task(F), rollout(F)) == 4.0
    assert toolrl_reward(task(F), rollout(F, answer=" ")) == 3.0
    assert toolrl_reward(task(F), rollout(F, stop=StopReason.MAX_TURNS)) == 3.0
    assert toolrl_reward(task(F), rollout(F, "malformed")) == 3.0
    assert toolrl_reward(task(F), rollout("malformed")) == -3.0
    assert toolrl_reward(task(), rollout(F)) == 1.0  # nothing to compare with
    traced = Task("t", [], expert=ExpertTrace((ExpertTurn("", (F,), ("ok",)),)))
    assert toolrl_reward(traced, rollout(F)) == 4.0 and toolrl_reward(traced, rollout(G)) == -2.0


def test_the_training_reward_of_ftrl_is_solve_f1_less_penalties() -> None:
    for path, reward in [(rollout(F), 0.4), (rollout("malformed"), -0.3), (rollout(answer=""), -0.5), (rollout(), 0.4)]:
        assert ftrl_reward(task(), path) is None
        path.env_rewards = {"solve_f1": 0.4}
        assert ftrl_reward(task(), path) == reward


def test_shipped_rewards_are_named_in_the_settings_beside_ones_own() -> None:
    functions = load_reward_functions(["toolrl", "math:sqrt", "ftrl"])
    assert list(functions) == ["toolrl", "sqrt", "ftrl"]
    del functions["sqrt"]
    paths = [rollout(F), rollout("malformed")]
    paths[1].env_rewards = {"solve_f1": 0.0}
    assert call_reward_functions(functions, [task(F)] * 2, paths, [[], []]) == [
        {"toolrl": 4.0},
        {"toolrl": -3.0, "ftrl": -0.3},
    ]
    with pytest.raises(PactError, match=r"'toolr': write file\.py:name or module:name, or one of ftrl, toolrl"):
        load_reward_functions(["toolr"])


def test_functions_alone_may_be_the_reward() -> None:
    path = rollout(F)
    path.env_rewards = {"success": 1.0}
    score(RewardConfig(outcome="none"), task(F), path, {"toolrl": 4.0}, outcome_only=True)
    assert path.reward == 4.0 and path.reward_parts["success"] == 1.0
    settings = ["algorithm.name=grpo", "algorithm.reward.outcome=none"]
    config = load_config("quickstart", settings)
    with pytest.raises(PactError, match=r"outcome=none leaves nothing to reward; set algorithm\.reward\.functions"):
        check_settings(config, make_algorithm(config.algorithm))
    config = load_config("quickstart", [*settings, "algorithm.reward.functions=[toolrl]"])
    check_settings(config, make_algorithm(config.algorithm))


@pytest.mark.parametrize("tokens, penalty", [(0, 0.0), (60, 0.0), (61, -0.05), (80, -1.0), (100, -2.0)])
def test_a_rollout_near_its_limit_loses_reward(tokens: int, penalty: float) -> None:
    buffer = OverlongBufferConfig(enable=True, len=40, penalty_factor=2.0)
    assert overlong_penalty(tokens, 100, buffer) == pytest.approx(penalty)
    for outcome_only in (True, False):
        path = rollout(F, tokens=tokens)
        path.env_rewards = {"success": 1.0}
        config = RewardConfig(overlong_buffer=buffer)
        score(config, task(F), path, outcome_only=outcome_only, max_completion_length=100)
        assert path.reward == pytest.approx(1.0 + penalty) and path.reward_parts["overlong"] == pytest.approx(penalty)
        score(
            config.model_copy(update={"overlong_buffer": OverlongBufferConfig()}),
            task(F),
            path,
            max_completion_length=100,
        )
        assert "overlong" not in path.reward_parts


def test_a_buffer_longer_than_a_rollout_is_refused() -> None:
    config = load_config(
        "quickstart", ["algorithm.reward.overlong_buffer.enable=true", "algorithm.reward.overlong_buffer.len=100000"]
    )
    with pytest.raises(PactError, match=r"overlong_buffer\.len=100000 is longer than a rollout"):
        check_settings(config, make_algorithm(config.algorithm))
