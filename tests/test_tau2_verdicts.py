"""τ²-bench: the reward is that of the package's evaluator."""

import json

import pytest

from benchmarks import tau2_verdicts
from benchmarks.tau2_reference import Event, package_verdict
from benchmarks.tau2_verdicts import chosen
from pact_fast.envs.tau2.env import nothing_done
from pact_fast.envs.tau2.reference import reference_actions, split_ids, task_by_id, tasks_by_id
from pact_fast.envs.tau2.verdict import Verdict, judge, reward_basis
from pact_fast.errors import PactError
from tests.support.tau2 import ROAMING, SERVICE, TRANSFER, finish, needs_tau2, play_reference, start

pytestmark = needs_tau2


@pytest.mark.parametrize(("name", "tasks", "floor"), [("airline", 50, 19), ("retail", 114, 7), ("telecom", 114, 0)])
def test_reference_actions_are_rewarded_and_doing_nothing_pays_the_floor(name, tasks, floor):
    ids = split_ids(name, "base")
    assert len(ids) == tasks
    assert [task_id for task_id in ids if play_reference(name, task_id) != 1.0] == []
    assert sum(nothing_done(name, task_id) for task_id in ids) == floor


def test_reference_actions_are_rewarded_when_the_agent_works_alone():
    assert [
        task_id for task_id in split_ids("telecom", "base") if play_reference("telecom", task_id, solo=True) != 1.0
    ] == []


@pytest.mark.slow
def test_reference_actions_of_all_generated_tasks_are_rewarded():
    ids = split_ids("telecom", "full")
    assert len(ids) == 2285
    assert [task_id for task_id in ids if play_reference("telecom", task_id, solo=True) != 1.0] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solo", "episodes"),
    [("telecom", True, 16), ("telecom", False, 16), ("retail", False, 3), ("airline", False, 2)],
)
def test_verdicts_and_observations_equal_those_of_the_package(name, solo, episodes):
    """A sample; all of them: python -m benchmarks.tau2_verdicts."""
    seen = set()
    for script in chosen(name, solo, None)[:episodes]:
        verdict, events = script.play()
        wanted = package_verdict(name, script.task_id, events, solo, "agent_stop" if solo else "user_stop")
        assert (verdict.reward, verdict.components) == (wanted["reward"], wanted["components"]), script
        seen.add(verdict.reward)
    assert seen == {0.0, 1.0} or episodes < 16


def test_an_episode_that_nobody_ended_is_worth_nothing():
    for ending, reward in [(None, 0), ("user_stop", 1), ("agent_stop", 1), ("too_many_errors", 0), ("agent_error", 0)]:
        episode = start("telecom", SERVICE)
        episode.call("user", "toggle_airplane_mode", {})
        episode.ending = ending
        assert judge(episode, []).reward == reward


def user_of(episode):
    """A user of the task, and the address on file."""
    actions = episode.task["evaluation_criteria"]["actions"]
    user_id = next(action["arguments"]["user_id"] for action in actions if action["name"] == "get_user_details")
    return user_id, json.loads(episode.call("assistant", "get_user_details", {"user_id": user_id}))["address"]


def test_one_write_too_many_is_a_wrong_database():
    episode = start("retail", "2")
    for side, call in reference_actions(episode.task):
        episode.call(side, call.name, call.arguments)
    info = episode.task["evaluation_criteria"]["communicate_info"]
    assert judge(episode, info).components == {"DB": 1.0, "COMMUNICATE": 1.0}
    user_id, address = user_of(episode)
    episode.call("assistant", "modify_user_address", {"user_id": user_id, **address, "zip": "00000"})
    assert judge(episode, info).components == {"DB": 0.0, "COMMUNICATE": 1.0}


def test_a_record_that_is_read_or_changed_back_counts_as_unchanged():
    episode = start("retail", "2")
    user_id, address = user_of(episode)
    assert episode.state.changes()["users"] == {}
    episode.call("assistant", "modify_user_address", {"user_id": user_id, **address, "zip": "00000"})
    assert list(episode.state.changes()["users"]) == [user_id]
    episode.call("assistant", "modify_user_address", {"user_id": user_id, **address})
    assert episode.state.changes()["users"] == {}


def test_communicate_looks_for_a_piece_of_text_without_commas():
    task_id, info = next(
        (task_id, found) for task_id, task in tasks_by_id("airline").items()
        if (found := task["evaluation_criteria"]["communicate_info"]) and len(found[0]) > 3
    )  # fmt: skip
    episode = start("airline", task_id)
    number = f"{int(info[0]):,}"
    assert "," in number
    assert judge(episode, [f"That is ${number}."]).components["COMMUNICATE"] == float(len(info) == 1)
    assert judge(episode, [f"x{text}x" for text in info]).components["COMMUNICATE"] == 1.0  # a trap of the benchmark
    assert judge(episode, []).components["COMMUNICATE"] == 0.0


def test_the_action_check_asks_neither_who_called_nor_with_success():
    """As in the package; its only tasks with ACTION accept any arguments."""
    episode = start("telecom", TRANSFER)
    assert reward_basis(episode.task) == ("ENV_ASSERTION", "ACTION")
    assert judge(episode, []).components == {"ENV_ASSERTION": 1.0, "ACTION": 0.0}
    answer = episode.call("assistant", "transfer_to_human_agents", {})
    assert answer.startswith("Error:") and judge(episode, []).components["ACTION"] == 1.0
    events = [Event("assistant", "", "transfer_to_human_agents", {}, answer)]
    assert package_verdict("telecom", TRANSFER, events, False, "user_stop")["reward"] == 1.0


def test_no_telecom_task_is_judged_by_its_database():
    """The package's hash of it differs between two plays of the same actions."""
    assert {basis for task in tasks_by_id("telecom").values() for basis in reward_basis(task)} == {
        "ENV_ASSERTION",
        "ACTION",
    }


def test_a_reward_that_needs_a_language_model_is_refused():
    task = task_by_id("airline", "0")
    other = {**task, "evaluation_criteria": {**task["evaluation_criteria"], "reward_basis": ["DB", "NL_ASSERTION"]}}
    with pytest.raises(PactError, match=r"tau2 task 0: its reward basis has NL_ASSERTION"):
        reward_basis(other)


def test_a_damaged_phone_fails_its_assertions():
    episode = start("telecom", ROAMING)
    assert episode.call("user", "set_apn_settings", {"apn_settings": "x"}).startswith("Error:")
    assert finish(episode) == 0.0


@pytest.mark.slow
def test_the_comparison_reports_a_verdict_that_differs(monkeypatch, capsys):
    monkeypatch.setattr(tau2_verdicts, "full_set", lambda failures: {})
    options = ["--domains", "telecom alone", "--most", "1"]
    assert tau2_verdicts.main(options) == 0
    monkeypatch.setattr(tau2_verdicts, "judge", lambda episode, texts: Verdict(1.0, {"ENV_ASSERTION": 1.0}))
    assert tau2_verdicts.main(options) == 1
    assert "DIFFERS: ['telecom', True" in capsys.readouterr().out
