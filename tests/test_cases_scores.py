"""Answers, outcomes and reward functions on values that other projects' users stumbled over."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pact_fast.algorithms.base import Group
from pact_fast.config import RewardConfig
from pact_fast.data.absent import answer_text, is_absent
from pact_fast.data.rows import task_from_row
from pact_fast.data.types import Task, ToolCall, Trajectory, TurnRecord
from pact_fast.envs.python_tools.env import PythonTools
from pact_fast.errors import PactError
from pact_fast.rewards.answers import token_f1
from pact_fast.rewards.feedback import Feedback
from pact_fast.rewards.ftrl import contains_parts, solve_score
from pact_fast.rewards.functions import call_reward_functions
from pact_fast.rewards.score import score, turn_rewards
from pact_fast.rewards.toolhop import is_correct
from pact_fast.rollout.env_calls import copy_for
from pact_fast.train.evaluate import reward_means, success_rate
from pact_fast.train.metrics import logged_metrics, rollout_metrics
from pact_fast.train.step import with_logged

ABSENT = [None, float("nan"), "", "  \n", "null", "\u200b", "\ufeff "]


def answered(text: str, *before: TurnRecord) -> Trajectory:
    turns = [*before, TurnRecord(text=text, reasoning="", content=text)]
    n = 2
    return Trajectory(
        "t", np.zeros(1, np.int64), np.arange(n), np.zeros(n, np.uint8), np.zeros(n, np.int16), np.ones(n, bool),
        np.zeros(n, np.float32), np.zeros(n, np.int32), turns, "answer",
    )  # fmt: skip


def row(**columns: Any) -> Task:
    return task_from_row({"prompt": "q", **columns}, "t")


# numbers are compared as numbers


@pytest.mark.parametrize(
    ("reference", "said", "equal"),
    [
        (42.0, "42", True),
        (42.0, "420", False),
        (-5, "5", False),
        (-5, "−5", True),
        (3.5, "3.50", True),
        (3.5, "35", False),
        ("1,234.50", "1234.5", True),
        ("$1,000", "1000", True),
        ("-$5", "($-5.)", True),
        (0.5, ".5", True),
        (1e3, "1000", True),
        ("4.2e1", "42.", True),
        (0, "-0.0", True),
        (12, "1/2", False),
        (1030, "10:30", False),
        ("007", "7", False),
        (123456789012345678901234567890, "123456789012345678901234567891", False),
        (True, "true", True),
        ("٤٢", "42", True),
    ],
)
def test_numbers_compare_as_numbers(reference, said, equal):
    task = row(answer=reference)
    (reward,) = turn_rewards(answered(f"<answer>{said}</answer>"), task, 0.0)
    assert (reward == 1.0) is equal and (equal or reward == 0.0)


def test_a_whole_number_has_one_spelling_for_toolhop_too():
    assert row(answer=42.0).answer == "42" == answer_text(42)
    assert row(answer=1e300).answer == "1e+300"
    assert is_correct(str(row(answer=42.0).answer), answered("It is 42"))


# absent is absent, and matches nothing


@pytest.mark.parametrize("value", ABSENT)
def test_an_absent_answer_is_absent_in_every_spelling(value):
    task = row(answer=value)
    assert task.answer is None and is_absent(value)
    assert turn_rewards(answered(""), task, 0.0) == [0.0]
    by_hand = Task("t", [], answer=value)
    assert turn_rewards(answered(""), by_hand, 0.0) == [0.0]


@pytest.mark.parametrize("value", ["0", 0, "None of them", "nan", "👍", False])
def test_a_short_answer_is_not_absent(value):
    assert row(answer=value).answer is not None


def test_a_bare_nan_in_json_is_absent():
    assert task_from_row(json.loads('{"prompt": "q", "answer": NaN}'), "t").answer is None


@pytest.mark.parametrize("reference", ["", " ", ",", ", ", ",, ,"])
def test_an_empty_reference_matches_nothing(reference):
    assert not contains_parts("anything, at all", reference)
    assert not is_correct(reference, answered("anything, at all"))
    assert token_f1("anything", reference) == token_f1("", "") == 0.0
    assert solve_score([Feedback("f", "anything", {})], {"f": [reference, "x"]}).solved == 0


@pytest.mark.parametrize("answer", ABSENT)
def test_toolhop_without_an_answer_is_an_error_that_names_the_row(answer):
    task = row(id="na0", answer=answer, ground_truth="7", env_args={"codes": {"f": "x"}, "scoring": "toolhop"})
    with pytest.raises(PactError, match=r"task na0: .*'answer'.*'ground_truth'"):
        PythonTools.check_task(task)


@pytest.mark.parametrize(
    ("env_args", "words"),
    [
        ({"scoring": "ftrl", "unsolved_set": {"f": [""]}}, "unsolved_set is empty"),
        ({"scoring": "ftrl"}, "unsolved_set is empty"),
        ({"scoring": "tool_hop"}, "did you mean 'toolhop'"),
    ],
)
def test_a_scoring_that_cannot_score_is_an_error(env_args, words):
    with pytest.raises(PactError, match=words):
        PythonTools.check_task(row(env_args={"codes": {"f": "x"}, **env_args}))


def test_an_answer_of_symbols_is_compared_by_its_symbols():
    assert token_f1("👍", "👍") == token_f1("❤\ufe0f", "❤") == token_f1("?!", "?!") == 1.0
    assert token_f1("👎", "👍") == token_f1("", "👍") == token_f1("yes", "👍") == 0.0
    assert token_f1("Sure 👍", "👍") == pytest.approx(2 / 3)
    assert token_f1("cafe\u0301", "café") == 1.0


# reward functions get copies


def shared_tasks() -> list[Task]:
    task = Task("t", [{"role": "user", "content": "q"}], answer="a", columns={"info": {"n": [1]}})
    return [task, task]


def test_what_a_reward_function_changes_changes_nothing():
    seen = []

    def greedy(prompts, completions, answer, info, completion_ids, **kwargs):
        seen.append(json.dumps([prompts, completions, answer, info, completion_ids]))
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.extend(completion)
            completion.clear()
        assert [len(prompt) for prompt in prompts] == [2, 2]  # rollouts of one prompt share no list
        answer[0], completion_ids[0][0] = "b", 99
        info[0]["n"].append(2)
        return [1.0, 0.0]

    tasks, paths = shared_tasks(), [answered("x"), answered("y")]
    messages = [path.to_messages() for path in paths]
    for _ in range(2):
        call_reward_functions({"a": greedy, "b": greedy}, tasks, paths, messages)
    assert len(set(seen)) == 1 and len(seen) == 4
    assert tasks[0].prompt == [{"role": "user", "content": "q"}] and tasks[0].columns == {"info": {"n": [1]}}
    assert paths[0].ids.tolist() == [0, 1] and messages[0] == paths[0].to_messages()


def test_a_users_environment_gets_copies():
    class Mine:
        pass

    task = shared_tasks()[0]
    copy_for(Mine(), task).prompt.clear()
    assert len(task.prompt) == 1
    assert copy_for(PythonTools.__new__(PythonTools), task) is task


# TRL's signature


def test_functions_get_trls_whole_signature():
    from transformers import TrainerState

    def score_it(completions, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("length", np.array([3, 4]))
        log_extra("note", [{"a": 1}, object])
        log_metric("accuracy", 0.25)
        log_metric("accuracy", 0.75)
        return [trainer_state.global_step / trainer_state.max_steps] * 2

    paths = [answered("x"), answered("y")]
    state = TrainerState(global_step=3, max_steps=4)
    rewards = call_reward_functions({"f": score_it}, shared_tasks(), paths, [[], []], state)
    assert rewards == [{"f": 0.75}, {"f": 0.75}]
    assert [path.extra["length"] for path in paths] == [3, 4] and paths[0].extra["note"] == {"a": 1}
    groups = [Group(shared_tasks()[0], 0, np.zeros(1, np.int64), paths, [np.zeros(2)] * 2)]
    assert logged_metrics(groups) == {"accuracy": 0.5}
    with pytest.raises(PactError, match=r"'loss'.*built in"):
        with_logged({"loss": 1.0}, {"loss": 2.0})


def test_functions_that_do_not_take_them_are_called_without():
    assert call_reward_functions({"f": lambda prompts, completions, completion_ids, answer, info: [1, 2]},
                                 shared_tasks(), [answered("x")] * 2, [[], []]) == [{"f": 1.0}, {"f": 2.0}]  # fmt: skip


def test_log_extra_wants_one_value_per_completion():
    with pytest.raises(PactError, match=r"'f' failed.*1 values for 2"):
        call_reward_functions({"f": lambda log_extra, **_: log_extra("a", [1])}, shared_tasks(), [answered("")] * 2,
                              [[], []])  # fmt: skip


def test_tool_messages_have_the_name_of_their_tool():
    turn = TurnRecord("", "", "", [ToolCall("f", {}), "not JSON", ToolCall("g", {})], ["1", "error", "2"])
    names = [m["name"] for m in answered("x", turn).to_messages() if m["role"] == "tool"]
    assert names == ["f", "unknown", "g"]


# a mean is over the rollouts that a part applies to


def scored(*parts: dict[str, float]) -> list[Trajectory]:
    paths = [answered("x") for _ in parts]
    for path, values in zip(paths, parts, strict=True):
        score(RewardConfig(), Task("t", []), path, values)
    return paths


def test_a_function_that_does_not_apply_is_left_out_of_its_mean():
    paths = scored({"f": 1.0, "g": 0.5}, {}, {"f": 1.0}, {})
    group = Group(Task("t", []), 0, np.zeros(1, np.int64), paths, [np.zeros(2)] * 4)
    values = rollout_metrics([group])
    assert values["reward/f"] == 1.0 and values["reward/g"] == 0.5
    assert values["reward/mean"] == pytest.approx(0.625)
    assert reward_means(paths) == {"f": 1.0, "g": 0.5, "match": 0.0}


@pytest.mark.parametrize(
    ("given", "mean"),
    [([1, None, 0.5, None], 0.75), ([None, None, None, 0.5], 0.5), ([None] * 4, None), ([0, 0, 0, None], 0.0)],
)
def test_none_of_a_reward_function_is_no_value(given, mean):
    tasks, paths = shared_tasks() * 2, [answered("x") for _ in given]
    parts = call_reward_functions({"f": lambda **_: given}, tasks, paths, [[]] * 4)
    group = Group(tasks[0], 0, np.zeros(1, np.int64), scored(*parts), [np.zeros(2)] * 4)
    assert rollout_metrics([group]).get("reward/f") == mean
    assert reward_means(group.trajectories).get("f") == mean


def test_success_is_over_the_tasks_that_have_an_outcome():
    paths = [answered("x") for _ in range(3)]
    paths[0].reward_parts, paths[1].reward_parts = {"success": 1.0}, {"success": 0.0}
    assert (success_rate(paths).mean, success_rate(paths).n) == (0.5, 2)
    assert success_rate(paths[2:]).n == 0 and str(success_rate(paths[2:])) == "no outcome"
    assert reward_means(paths[2:]) == {}
