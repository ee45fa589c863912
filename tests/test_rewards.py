"""Matching, answers, turn rewards and user reward functions, against hand-computed cases and brute force."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pact_fast.config import RewardConfig
from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall, Trajectory, TurnRecord
from pact_fast.errors import PactError
from pact_fast.rewards.answers import answer_tokens, extract_answer, token_f1
from pact_fast.rewards.functions import call_reward_functions, load_reward_function, load_reward_functions
from pact_fast.rewards.matching import json_equal, match, similarity
from pact_fast.rewards.score import score, turn_rewards


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


def trajectory(*turns: TurnRecord, stop: str = "max_turns", ids: int = 2) -> Trajectory:
    empty = np.zeros(ids)
    return Trajectory(
        task_id="t",
        prompt_ids=np.zeros(1, np.int64),
        ids=np.arange(ids),
        components=empty.astype(np.uint8),
        turn_ids=empty.astype(np.int16),
        sampled=empty.astype(bool),
        logprobs=empty.astype(np.float32),
        versions=empty.astype(np.int32),
        turns=list(turns),
        stop_reason=stop,
    )


def turn(*attempts: ToolCall | str, content: str = "") -> TurnRecord:
    return TurnRecord(text="", reasoning="", content=content, attempts=list(attempts))


def task(reference: list[ToolCall] | None = None, answer: str | None = None, **columns: Any) -> Task:
    return Task("t", [{"role": "user", "content": "q"}], reference_calls=reference, answer=answer, columns=columns)


# similarity


@pytest.mark.parametrize(
    ("predicted", "reference", "expected"),
    [
        (call("f", a=1, b=2), call("f", a=1, b=2), 1.0),
        (call("f", a=1), call("g", a=1), 0.0),
        (call("f"), call("f"), 1.0),
        (call("f", a=1, b=2), call("f", a=1, b=9), (1 + 1 + 1) / 4),
        (call("f", a=1), call("f", a=1, b=2), (1 + 1 / 2 + 1) / 4),
        (call("f", a=1, b=2), call("f", a=1), (1 + 1 / 2 + 1) / 3),
        (call("f", a=1, c=2), call("f", a=1, b=2), (1 + 1 / 3 + 1) / 4),
        (call("f"), call("f", a=1), 1 / 3),
        (call("f", a=1), call("f"), 1 / 2),
    ],
)
def test_similarity_by_hand(predicted: ToolCall, reference: ToolCall, expected: float) -> None:
    assert similarity(predicted, reference) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (False, 0, False),
        (True, True, True),
        (None, 0, False),
        (None, None, True),
        ("1", 1, False),
        ("a", "a ", False),
        ("A", "a", False),
        ([1, [2.0]], [1.0, [2]], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ([True], [1], False),
        ({"x": 1, "y": {"z": 0}}, {"y": {"z": 0.0}, "x": 1}, True),
        ({"x": {"z": False}}, {"x": {"z": 0}}, False),
        ({"x": 1}, {"x": 1, "y": None}, False),
        ({}, [], False),
    ],
)
def test_arguments_are_compared_as_json_values(a: Any, b: Any, equal: bool) -> None:
    assert json_equal(a, b) is equal
    assert json_equal(b, a) is equal


# matching


def brute_force(predicted: list[ToolCall], reference: list[ToolCall]) -> float:
    """Largest total similarity, by trying every injection of predictions into references (or into nothing)."""
    places = [*range(len(reference)), *[-1] * len(predicted)]
    return max(
        sum(similarity(p, reference[j]) for p, j in zip(predicted, choice, strict=True) if j >= 0)
        for choice in set(itertools.permutations(places, len(predicted)))
    )


def random_call(rng: random.Random) -> ToolCall:
    keys = rng.sample("abc", rng.randint(0, 3))
    return ToolCall(rng.choice("fg"), {key: rng.randint(0, 1) for key in keys})


def test_matching_reaches_the_brute_force_optimum() -> None:
    rng = random.Random(0)
    greedy_was_worse = 0
    for _ in range(150):
        predicted = [random_call(rng) for _ in range(rng.randint(0, 4))]
        reference = [random_call(rng) for _ in range(rng.randint(0, 4))]
        scores = match(predicted, reference)
        assert scores.shape == (len(predicted),)
        best = brute_force(predicted, reference)
        assert scores.sum() == pytest.approx(best, abs=1e-12)
        greedy_was_worse += in_order(predicted, reference) < best - 1e-9
    assert greedy_was_worse > 10  # otherwise the cases would not tell an assignment solver from a loop


def in_order(predicted: list[ToolCall], reference: list[ToolCall]) -> float:
    left, total = list(reference), 0.0
    for p in predicted:
        best = max(left, key=lambda r: similarity(p, r), default=None)
        if best is not None and similarity(p, best) > 0:
            total += similarity(p, best)
            left.remove(best)
    return total


def test_matching_prefers_the_best_pairs_to_the_order_of_calls() -> None:
    predicted = [call("f", x=1), call("f", x=1, y=2)]
    reference = [call("f", x=1, y=2), call("f", x=1)]
    assert match(predicted, reference).tolist() == [1.0, 1.0]


def test_a_reference_is_matched_once_and_the_rest_is_penalised() -> None:
    scores = match([call("f", x=1), call("f", x=1), call("g")], [call("f", x=1), call("h")], penalty=0.25)
    assert sorted(scores[:2]) == [-0.25, 1.0]
    assert scores[2] == -0.25


def test_matching_with_an_empty_side() -> None:
    assert match([], [call("f")]).shape == (0,)
    assert match([call("f"), call("f")], [], penalty=0.5).tolist() == [-0.5, -0.5]
    assert not np.signbit(match([call("f")], [])[0])  # 0.0, not -0.0


# answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", "plain text"),
        ("so <answer>42</answer>.", "42"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer> open", "<answer> open"),
        ("closed</answer>", "closed</answer>"),
        ("</answer><answer>late", "</answer><answer>late"),
        ("<answer>1</answer> <answer>", "1"),
        ("<answer></answer>", ""),
    ],
)
def test_the_last_closed_answer_counts(text: str, expected: str) -> None:
    assert extract_answer(text) == expected


def test_answer_words_lose_case_and_punctuation() -> None:
    assert answer_tokens("The U.S.A. - it's «Über», $5!") == ["the", "usa", "its", "über", "5"]
    assert answer_tokens("नमस्ते!") == ["नमस्ते"]  # vowel signs are not punctuation


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Paris", "paris.", 1.0),
        ("the city of Paris", "Paris", 2 * 1 / 5),
        ("a a b", "a b b", 2 * 2 / 6),
        ("b a", "a b", 1.0),
        ("x", "y", 0.0),
        ("", "y", 0.0),
        ("?!", "", 0.0),
    ],
)
def test_token_f1_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected, abs=1e-15)
    assert token_f1(reference, prediction) == token_f1(prediction, reference)


# turn rewards


def test_turn_reward_is_the_mean_over_its_calls_and_the_answer_is_token_f1() -> None:
    path = trajectory(
        turn(call("f", x=1), call("f", x=2)),  # 1 and (1 + 1 + 0) / 3
        turn("the arguments of 'g' are not JSON", call("g")),  # −0.5 and 1
        turn("no such tool"),  # −0.5
        turn(content="It is <answer>forty two</answer>"),
        stop="answer",
    )
    rewards = turn_rewards(path, task([call("f", x=1), call("f", x=3), call("g")], answer="Two"), penalty=0.5)
    assert rewards == pytest.approx([(1 + 2 / 3) / 2, 0.25, -0.5, 2 / 3], abs=1e-15)


def test_calls_are_matched_over_the_whole_trajectory() -> None:
    path = trajectory(turn(call("f", x=1)), turn(call("f", x=1)), turn())
    assert sorted(turn_rewards(path, task([call("f", x=1)]), penalty=0.0)) == [0.0, 0.0, 1.0]


def test_no_answer_reward_without_a_reference_or_a_final_answer() -> None:
    final = turn(content="42")
    assert turn_rewards(trajectory(final, stop="answer"), task([]), 0.0) == [0.0]
    assert turn_rewards(trajectory(final, stop="max_turn_tokens"), task([], answer="42"), 0.0) == [0.0]
    cut = turn(call("f"), content="42")
    assert turn_rewards(trajectory(cut, stop="max_turn_tokens"), task([call("f")], answer="42"), 0.0) == [1.0]
    assert turn_rewards(trajectory(final, stop="answer"), task([], answer="42"), 0.0) == [1.0]


def test_reference_calls_default_to_the_experts_and_none_at_all_means_no_penalty() -> None:
    path = trajectory(turn(call("f", x=1), "malformed"))
    expert = ExpertTrace((ExpertTurn("", (call("f", x=1),), ("ok",)),))
    assert turn_rewards(path, Task("t", [], expert=expert), 0.5) == [0.25]
    assert turn_rewards(path, Task("t", [], expert=expert, reference_calls=[]), 0.5) == [-0.5]
    assert turn_rewards(path, Task("t", []), 0.5) == [0.0]


# the trajectory's reward


def test_score_weights_the_parts() -> None:
    path = trajectory(turn(call("f")), turn(content="7"), stop="answer")
    config = RewardConfig(match_weight=2.0, env_weight=10.0)
    path.env_rewards = {"success": 0.5, "solve_p": 0.3}
    score(config, task([call("f")], answer="7"), path, {"style": -0.25})
    assert path.turn_rewards == [1.0, 1.0]
    assert path.reward == pytest.approx(2 * 2 + 10 * 0.5 - 0.25)
    assert path.reward_parts == {"match": 2.0, "success": 0.5, "solve_p": 0.3, "style": -0.25}


def test_environment_rewards_are_recorded_but_not_counted_by_default() -> None:
    path = trajectory(turn(call("f")))
    path.env_rewards = {"success": 1.0}
    score(RewardConfig(), task([call("f")]), path)
    assert path.reward == 1.0
    assert path.reward_parts["success"] == 1.0


def test_outcome_only_counts_the_environments_success_where_it_gives_one() -> None:
    path = trajectory(turn(call("f")))
    path.env_rewards = {"success": 0.25}
    score(RewardConfig(), task([call("f")]), path, {"style": 0.5}, outcome_only=True)
    assert path.reward == 0.75 and path.turn_rewards == [1.0]
    path.env_rewards = {}
    score(RewardConfig(), task([call("f")]), path, {"style": 0.5}, outcome_only=True)
    assert path.reward == 1.5


@pytest.mark.parametrize(
    ("config", "env", "functions", "words"),
    [
        (RewardConfig(env_weight=1.0), {}, {}, ["task t", "'success'", "env_weight"]),
        (RewardConfig(), {}, {"style": math.nan}, ["task t", "'style'", "nan"]),
        (RewardConfig(), {"success": math.inf}, {}, ["task t", "'success'", "inf"]),
        (RewardConfig(), {}, {"match": 1.0}, ["'match'", "rename"]),
    ],
)
def test_unusable_rewards_are_one_line_errors(config: RewardConfig, env: dict, functions: dict, words: list) -> None:
    path = trajectory(turn())
    path.env_rewards = env
    with pytest.raises(PactError) as caught:
        score(config, task([]), path, functions)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


# user functions

SOURCE = """
import asyncio
CALLS = []

def length(completions, **kwargs):
    CALLS.append("length")
    return [len(c[-1]["content"]) for c in completions]

def seen(prompts, completion_ids, answer, level, **kwargs):
    CALLS.append((prompts, completion_ids, answer, level, sorted(kwargs)))
    return [None, 0.5]

async def slow(completions, **kwargs):
    await asyncio.sleep(0)
    return [True for _ in completions]

def broken(completions, **kwargs):
    return 1 // 0

def narrow(completions):
    return []

constant = 3
"""


@pytest.fixture
def rewards_file(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return str(path)


def messages(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_functions_get_trls_keywords_and_none_is_not_counted(rewards_file: str) -> None:
    functions = load_reward_functions([f"{rewards_file}:{name}" for name in ("length", "seen", "slow")])
    tasks = [task(answer="x", level=3), task(other="o")]
    paths = [trajectory(turn(), ids=2), trajectory(turn(), ids=3)]
    result = call_reward_functions(functions, tasks, paths, messages("abc", "de"))
    assert result == [{"length": 3.0, "slow": 1.0}, {"length": 2.0, "seen": 0.5, "slow": 1.0}]
    assert all(type(value) is float for parts in result for value in parts.values())
    calls = functions["seen"].__globals__["CALLS"]
    prompt = [{"role": "user", "content": "q"}]
    assert calls == [
        "length",
        (
            [prompt, prompt],
            [[0, 1], [0, 1, 2]],
            ["x", None],
            [3, None],
            ["completions", "log_extra", "log_metric", "other", "trainer_state"],
        ),
    ]


def test_no_functions_no_rewards() -> None:
    assert call_reward_functions({}, [task()], [trajectory(turn())], messages("a")) == [{}]


def test_arrays_are_accepted_as_lists() -> None:
    functions = {"f": lambda **_: np.array([1, 2], np.int32)}
    result = call_reward_functions(functions, [task()] * 2, [trajectory(turn())] * 2, messages("a", "b"))
    assert result == [{"f": 1.0}, {"f": 2.0}]


def test_functions_load_from_modules() -> None:
    assert load_reward_function("math:sqrt") is math.sqrt


def test_functions_of_one_name_keep_their_whole_spec(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(f"def score(**kwargs):\n    return ['{name}']\n")
    specs = [f"{tmp_path}/one.py:score", f"{tmp_path}/two.py:score"]
    functions = load_reward_functions([*specs, "math:sqrt"])
    assert list(functions) == [*specs, "sqrt"]
    assert functions[specs[1]]() == ["two"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no_colon", ["no_colon", "file.py:name"]),
        ("missing.py:f", ["no file missing.py"]),
        ("no_such_module_anywhere:f", ["no_such_module_anywhere", "file.py:name"]),
        ("{file}:lenght", ["has no 'lenght'", "did you mean 'length'?"]),
        ("{file}:constant", ["int"]),
        ("{bad}:f", ["cannot be imported", "ValueError: two lines", "bad.py:2"]),
        ("{syntax}:f", ["cannot be imported", "SyntaxError", "line 1"]),
    ],
)
def test_what_cannot_be_loaded_is_a_one_line_error(
    spec: str, words: list[str], rewards_file: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.py").write_text("\nraise ValueError('two\\nlines')\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    spec = spec.format(file=rewards_file, bad=tmp_path / "bad.py", syntax=tmp_path / "syntax.py")
    with pytest.raises(PactError) as caught:
        load_reward_function(spec)
    assert "\n" not in str(caught.value)
    assert spec in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda **_: None, ["NoneType", "list of 2"]),
        (lambda **_: 1.0, ["float", "list of 2"]),
        (lambda **_: np.float64(1), ["float64", "list of 2"]),
        (lambda **_: [1.0], ["1 values", "list of 2"]),
        (lambda **_: [1.0, "high"], ["not a number"]),
        (lambda **_: {0: 1, 1: 2}, ["dict"]),
    ],
)
def test_a_wrong_return_value_names_the_function(function: Any, words: list[str]) -> None:
    with pytest.raises(PactError) as caught:
        call_reward_functions({"style": function}, [task()] * 2, [trajectory(turn())] * 2, messages("a", "b"))
    for word in ["'style'", *words]:
        assert word in str(caught.value)


def test_a_failing_function_names_itself_and_the_line(rewards_file: str) -> None:
    functions = load_reward_functions([f"{rewards_file}:broken"])
    with pytest.raises(PactError, match=r"'broken' failed: ZeroDivisionError: .*my_rewards\.py:18\)"):
        call_reward_functions(functions, [task()], [trajectory(turn())], messages("a"))
    functions = load_reward_functions([f"{rewards_file}:narrow"])
    with pytest.raises(PactError, match=r"'narrow' failed: TypeError: .*unexpected keyword argument"):
        call_reward_functions(functions, [task()], [trajectory(turn())], messages("a"))
