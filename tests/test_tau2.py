"""τ²-bench as an environment: tools, users, tasks, traces, and the traps of the package."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from pact_fast.config import Config, EnvConfig, RolloutConfig
from pact_fast.data.types import StopReason, Task, ToolCall, Trajectory, TurnRecord
from pact_fast.envs.base import Environment, has_user
from pact_fast.envs.registry import EnvironmentFactory, make_tasks
from pact_fast.envs.tau2 import upstream
from pact_fast.envs.tau2.arithmetic import calculate
from pact_fast.envs.tau2.dialogue import Dialogue
from pact_fast.envs.tau2.domains import domain
from pact_fast.envs.tau2.env import Tau2, Tau2Solo
from pact_fast.envs.tau2.episode import CLOSED, MAX_ERRORS
from pact_fast.envs.tau2.reference import reference_actions, split_ids, task_by_id
from pact_fast.envs.tau2.tasks import held_out_ids, make_task, training_ids
from pact_fast.envs.tau2.users import Tau2ModelUser, UserTurn, first_person
from pact_fast.envs.tau2.verdict import judge
from pact_fast.errors import DataError, PactError
from pact_fast.evaluation.benchmark import benchmark
from pact_fast.rollout.agent import AgentLoop, Job
from tests.support.groups import lookup_chain_renderer
from tests.support.hostile_outputs import NAMES, VALUES, audited, hostile_text, nested
from tests.support.scripted_engine import Script
from tests.support.tau2 import ROAMING, SERVICE, TRANSFER, converse, finish, needs_tau2, play_reference, start

pytestmark = needs_tau2
OTHER = {"customer_id": "C1002", "line_id": "L1004", "gb_amount": 1.0}  # a customer without a draft bill


def trajectory(*turns: list[ToolCall | str], texts: tuple[str, ...] = ()) -> Trajectory:
    none = np.zeros(0, np.int64)
    records = [TurnRecord("", "", "", list(calls)) for calls in turns] + [TurnRecord(text, "", text) for text in texts]
    return Trajectory("t", none, none, none, none, none, none, none, records, StopReason.ANSWER)


def serve(task: Task):
    env = Tau2() if task.env == "tau2" else Tau2Solo()
    assert env.reset(task) is None and isinstance(env, Environment)
    return env


# --- the environment


def test_a_ticket_is_solved_by_its_expert_trace_through_the_environment():
    task = make_task("telecom", ROAMING, solo=True)
    env = serve(task)
    assert [schema["function"]["name"] for schema in env.tools] == [t["function"]["name"] for t in task.tools]
    observed = [tuple(env.call(call.name, call.arguments) for call in turn.calls) for turn in task.expert.turns]
    assert observed == [turn.observations for turn in task.expert.turns]
    done = trajectory(*([*turn.calls] for turn in task.expert.turns))
    assert env.reward(task, done) == {"success": 1.0, "env_assertion": 1.0, "nothing": 0.0}
    assert env.call("enable_roaming", {"customer_id": "C1001", "line_id": "L1002"}) == CLOSED
    env.reset(task)
    assert env.reward(task, trajectory())["success"] == 0.0  # the instance serves the task again


def test_without_done_a_ticket_pays_nothing():
    task = make_task("telecom", ROAMING, solo=True)
    env = serve(task)
    for call in task.expert.calls[:-1]:
        env.call(call.name, call.arguments)
    assert has_user(Tau2) and not has_user(Tau2Solo)  # so that a message to nobody ends the episode
    assert env.reward(task, trajectory(texts=("It is solved.",))) == {
        "success": 0.0,
        "env_assertion": 1.0,
        "nothing": 0.0,
    }


def test_calls_beside_done_do_not_count():
    """The package drops all calls of a message that calls `done`."""
    task = make_task("telecom", ROAMING, solo=True)
    *before, last, done = task.expert.calls
    env = serve(task)
    for call in (*before, last, done):
        env.call(call.name, call.arguments)
    assert env.reward(task, trajectory(before, [last], [done]))["success"] == 1.0
    assert env.reward(task, trajectory(before, [last, done]))["success"] == 0.0
    assert env.reward(task, trajectory(before, [last], [done, last]))["success"] == 1.0


def test_ten_failed_calls_end_an_episode_unrewarded():
    episode = start("telecom", ROAMING, solo=True)
    for _ in range(MAX_ERRORS):
        assert episode.call("assistant", "enable_roaming", {"customer_id": "C1001", "line_id": "x"}).startswith(
            "Error:"
        )
    assert episode.call("assistant", "enable_roaming", {"customer_id": "C1001", "line_id": "L1002"}) == CLOSED
    assert episode.ending == "too_many_errors" and finish(episode) == 0.0


def test_a_dialogue_ends_when_the_user_says_so_and_counts_what_was_said():
    task_id = next(
        i for i in split_ids("airline", "base") if task_by_id("airline", i)["evaluation_criteria"]["communicate_info"]
    )
    task = make_task("airline", task_id, solo=False)
    env = serve(task)
    assert task.prompt[-1]["content"].startswith("I ") and "You " not in task.prompt[-1]["content"]
    for call in task.reference_calls:
        env.call(call.name, call.arguments)
    assert env.reward(task, trajectory(texts=(task.expert.answer,)))["success"] == 0.0  # the user is still there
    assert env.respond(task.expert.answer) is None
    reward = env.reward(task, trajectory(texts=(task.expert.answer,)))
    assert reward == {"success": 1.0, "db": 1.0, "communicate": 1.0, "nothing": 0.0}
    assert env.reward(task, trajectory(texts=("Goodbye",)))["communicate"] == 0.0


@pytest.mark.parametrize(
    ("last", "success"),
    [("Thank you. ###STOP###", 1.0), ("###TRANSFER###", 1.0), ("I shall say ###STOP### later.", 0.0)],
)
def test_a_policy_or_model_that_plays_the_user_acts_on_its_phone_and_ends_the_dialogue(last, success):
    """Telecom's reference dialogue: the agent says what its trace says, the user what the scripted one said and did."""
    task = make_task("telecom", SERVICE, solo=False)
    renderer = lookup_chain_renderer()
    agent = [(turn.content, turn.calls) for turn in task.expert.turns] + [(task.expert.answer, ())]
    user: list[tuple[str, tuple[ToolCall, ...]]] = []
    pending = [call for side, call in reference_actions(task_by_id("telecom", SERVICE)) if side == "user"]
    for turn in task.expert.turns:
        if turn.user is not None:
            user += [("", (pending.pop(0),)), (turn.user, ())]
    user += [("", (call,)) for call in pending] + [(last, ())]
    limits = {"max_user_turns": sum(bool(text) for text, _ in user)}
    agent, user = [*agent, ("Goodbye.", ())], [*user, ("Bye.", ())]  # where the last message ends nothing
    turns = {0: agent, 1: user}
    ids = {side: [list(renderer.assistant_turn("", *said)[0]) for said in made] for side, made in turns.items()}
    env = Tau2()
    limits |= {"max_turns": 40, "max_turn_tokens": 2000, "max_completion_length": 20000, "max_prompt_length": 60000}
    loop = AgentLoop(Script(renderer, ids), renderer, lambda _: env, RolloutConfig(user="policy", **limits))
    shown = replace(task, tools=[], prompt=task.prompt[-1:])  # not 23,000 characters, byte by byte
    (trajectory,) = loop.run([Job(shown, (0, 0))])
    assert trajectory.env_rewards["success"] == success, (trajectory.stop_reason, env.episode.ending)
    assert [call.name for call in env.episode.calls if call.side == "user"]
    assert "###STOP###" in env.user_prompt() and env.user_tools


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solo", "limit"),
    [("telecom", True, 20), ("telecom", False, 5), ("retail", False, 5), ("airline", False, 5)],
)
def test_an_episode_takes_milliseconds(name, solo, limit):
    """Reset, reference actions and verdict, in milliseconds of CPU time."""
    ids = split_ids(name, "base")
    for task_id in ids:  # reads records and judges the reference once per process
        play_reference(name, task_id, solo)
    begin = time.process_time()
    for task_id in ids:
        play_reference(name, task_id, solo)
    assert (time.process_time() - begin) * 1000 / len(ids) < limit


# --- users


@pytest.mark.parametrize("name", ["airline", "retail", "telecom"])
def test_the_scripted_user_leads_reference_dialogues_to_their_reward(name):
    for task_id in split_ids(name, "test"):
        dialogue, _ = converse(name, task_id)
        assert judge(dialogue.episode, dialogue.said).reward == 1.0, task_id
        assert dialogue.episode.ending == "user_stop"


def test_the_scripted_user_does_what_it_is_asked_and_reports_it():
    dialogue = Dialogue("telecom", task_by_id("telecom", SERVICE), user_of("scripted"))
    assert "Status Bar" in dialogue.respond("Please look: check_status_bar.")
    assert [call.name for call in dialogue.episode.calls] == ["check_status_bar"]
    assert dialogue.respond("Is the data saver on? Use toggle_data_saver_mode") is not None
    assert [call.name for call in dialogue.episode.calls][1:] == ["toggle_data_saver_mode"]  # not toggle_data
    assert dialogue.respond("Now switch airplane mode off.") is None
    assert dialogue.episode.ending == "user_stop" and judge(dialogue.episode, []).reward == 1.0


def test_the_scripted_user_loses_its_patience_and_takes_a_transfer():
    dialogue = Dialogue("telecom", task_by_id("telecom", SERVICE), user_of("scripted"))
    replies = [dialogue.respond("Hm.") for _ in range(10)]
    assert replies.index(None) == 5 and dialogue.episode.ending == "user_stop"
    dialogue = Dialogue("telecom", task_by_id("telecom", TRANSFER), user_of("scripted"))
    dialogue.episode.call("assistant", "transfer_to_human_agents", {"summary": "locked"})
    assert dialogue.respond("I transfer you to a human agent.") is None
    assert judge(dialogue.episode, []).reward == 1.0


def user_of(name):
    from pact_fast.envs.tau2.users import user_factory

    return user_factory(name)


def test_a_model_user_sees_its_own_side_and_calls_its_tools():
    seen = []

    def complete(messages, tools):
        seen.append([(m["role"], m.get("content")) for m in messages])
        assert any(t["function"]["name"] == "toggle_airplane_mode" for t in tools)
        if messages[-1]["role"] == "tool":
            return {"role": "assistant", "content": "It is off now. ###STOP###"}
        call = {"id": "1", "type": "function", "function": {"name": "toggle_airplane_mode", "arguments": "{}"}}
        return {"role": "assistant", "content": "ignored beside a call", "tool_calls": [call]}

    dialogue = Dialogue("telecom", task_by_id("telecom", SERVICE), lambda role: Tau2ModelUser(role, complete))
    dialogue.episode.call("assistant", "get_customer_by_id", {"customer_id": "C1001"})
    assert dialogue.respond("Please switch airplane mode off.") is None
    assert [role for role, _ in seen[0]] == ["system", "user", "assistant", "user"]
    assert "John Smith" in seen[0][0][1] and "C1001" not in str(seen)
    assert seen[1][-1][0] == "tool" and "Airplane Mode is now OFF" in seen[1][-1][1]
    assert judge(dialogue.episode, []).reward == 1.0


def test_a_user_who_only_calls_or_says_nothing_ends_the_dialogue_unrewarded():
    class Silent:
        def reply(self, messages):
            return UserTurn()

    class Caller:
        def reply(self, messages):
            return UserTurn(calls=(ToolCall("check_status_bar", {}),))

    for user in (Silent, Caller):
        dialogue = Dialogue("telecom", task_by_id("telecom", SERVICE), lambda role, user=user: user())
        assert dialogue.respond("Hello") is None and dialogue.episode.ending == "user_error"
        assert judge(dialogue.episode, []).reward == 0.0
    dialogue = Dialogue("telecom", task_by_id("telecom", SERVICE), user_of("scripted"))
    assert dialogue.respond("  ") is None and dialogue.episode.ending == "agent_error"


def test_scenarios_are_put_into_the_first_person():
    assert (
        first_person("You are Ann. Your phone, which you've lost, is yours.")
        == "I am Ann. My phone, which I have lost, is yours."
    )


# --- tasks


def test_training_and_held_out_tasks_are_the_package_s_splits_and_never_overlap():
    for name, train, held_out in [("airline", 30, 20), ("retail", 74, 40), ("telecom", 74, 40)]:
        ids = training_ids(name, "base")
        assert (len(ids), len(held_out_ids(name))) == (train, held_out) and not set(ids) & set(held_out_ids(name))
    full = training_ids("telecom", "full")
    assert len(full) == len(set(full)) == 2245 and not set(full) & set(held_out_ids("telecom"))


def test_tasks_are_a_function_of_seed_and_step_and_epochs_differ():
    def ids(seed, step, count):
        args = {"domain": "telecom", "solo": True}
        config = Config(model={"path": "x"}, env=EnvConfig(name="tau2", args=args), seed=seed)
        return [task.id for task in make_tasks(config).train(step, count)]

    assert ids(0, 1, 5) == ids(0, 0, 10)[5:] != ids(1, 1, 5)
    first, second = ids(0, 0, 74), ids(0, 1, 74)
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize(
    ("name", "solo"), [("telecom", True), ("telecom", False), ("airline", False), ("retail", False)]
)
def test_expert_traces_of_all_benchmark_tasks_are_rewarded(name, solo):
    for task_id in split_ids(name, "base"):
        task = make_task(name, task_id, solo)
        env, seen, said = serve(task), json.dumps(task.prompt[-1]), []
        for turn in task.expert.turns:
            for call, observation in zip(turn.calls, turn.observations, strict=True):
                if name == "telecom":  # ids come from the prompt or from a tool's result
                    assert all(str(v) in seen for k, v in call.arguments.items() if k.endswith("_id")), task_id
                assert env.call(call.name, call.arguments) == observation and not observation.startswith("Error:")
                seen += observation
            if turn.user is not None:
                said.append(turn.content)
                assert env.respond(turn.content) == turn.user
        said.append(task.expert.answer)
        if not solo:
            env.respond(task.expert.answer)  # the last request to the user is the answer of a trace
        assert finish(env.episode, said) == 1.0, task_id
        assert task.reference_calls == task.expert.calls and task.columns == {"reasoning": "template"}
    assert name != "telecom" or solo or any(turn.user for turn in task.expert.turns)


def test_benchmarks_hold_all_tasks_with_their_splits():
    for name, solo, sizes in [("telecom", True, (40, 74)), ("telecom", False, (40, 74)), ("airline", False, (20, 30))]:
        bench = benchmark.get(f"tau2-{name}{'-solo' if solo else ''}")
        settings = dict(setting.split("=") for setting in bench.settings)
        assert (settings["env.name"], settings["env.args.domain"]) == ("tau2", name)
        made = bench(Config(model={"path": "x"}))
        assert (len(made.tasks("test")), len(made.tasks("train"))) == sizes
        assert [task.id for task in made.rows("test", "all")] == [task.id for task in made.tasks("test")]
        assert made.rows("test", "train") == []
        assert {task.env for task in made.tasks("test")} == {"tau2_solo" if solo else None}  # None: env.args.user holds


def test_rows_and_arguments_that_do_not_fit_are_named():
    for args, message in [
        ({"domain": "bank"}, "env.args.domain"),
        ({"domain": "retail", "solo": True}, "neither solo tasks nor a full set"),
        ({"turns": 3}, "env.args.turns"),
        ({"user": "gpt"}, "env.args.user"),
    ]:
        with pytest.raises(PactError, match=message):
            config = Config(model={"path": "x"}, env=EnvConfig(name="tau2", args=args))
            EnvironmentFactory(config)
    for env_args, message in [
        ({}, "env_args needs 'domain'"),
        ({"domain": "telecom", "task": "-1"}, "has no telecom task"),
        ({"domain": "retail", "task": "0"}, "retail has no solo tasks"),
    ]:
        with pytest.raises(DataError, match=message):
            Tau2Solo.check_task(Task("t", [{"role": "user", "content": "x"}], env_args=env_args))
    with pytest.raises(DataError, match="no domain 'bank'"):
        Tau2.check_task(Task("t", [{"role": "user", "content": "x"}], env_args={"domain": "bank", "task": "0"}))


def test_a_row_names_the_environment_and_its_task():
    config = Config(model={"path": "x"}, env=EnvConfig(name="lookup_chain"))
    task = make_task("telecom", ROAMING, solo=True)
    env = EnvironmentFactory(config)(task)
    env.reset(task)
    assert len(env.tools) == 13 + 30 + 1


# --- the package's traps


def test_the_same_actions_give_the_same_bill_ids():
    """The package draws them with uuid4, and then its evaluator raises when it replays the episode."""
    seen = []
    for _ in range(2):
        episode = start("telecom", ROAMING)
        assert "Successfully added" in episode.call("assistant", "refuel_data", OTHER)
        seen.append(episode.call("assistant", "get_customer_by_id", {"customer_id": "C1002"}))
    assert seen[0] == seen[1]
    bill = json.loads(seen[0])["bill_ids"][-1]
    assert bill.startswith("B") and len(bill) == 9
    assert '"status": "Draft"' in episode.call("assistant", "get_details_by_id", {"id": bill})


def test_a_broken_vpn_stays_in_its_own_episode():
    """The package keeps the details of the VPN in a class attribute, which `break_vpn` changes for all later episodes."""
    broken = next(i for i in split_ids("telecom", "full") if "bad_vpn" in i)
    start("telecom", broken)
    episode = start("telecom", ROAMING)
    episode.call("user", "connect_vpn", {})
    assert "EXCELLENT" in episode.call("user", "check_vpn_status", {})


def test_episodes_share_no_state_and_leave_the_database_alone():
    name, task_id = "airline", next(i for i in split_ids("airline", "base") if start("airline", i) and has_writes(i))
    before = json.dumps(upstream.read_json(name, "db.json"))
    first, second = start(name, task_id), start(name, task_id)
    for side, call in reference_actions(first.task):
        first.call(side, call.name, call.arguments)
    assert any(first.state.changes().values()) and not any(second.state.changes().values())
    assert json.dumps(upstream.read_json(name, "db.json")) == before
    results = []
    threads = [threading.Thread(target=lambda: results.append(play_reference(name, task_id))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [1.0] * 4


def has_writes(task_id):
    return any(
        call.name.startswith(("cancel", "update", "book"))
        for _, call in reference_actions(task_by_id("airline", task_id))
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 + 2", "4.0"),
        ("(1+2)*3/4", "2.25"),
        ("-2**2", "-4.0"),
        (" 7//2", "3.0"),
        ("2**0.5", "1.41"),
        (".1+.2", "0.3"),
        ("+-1.", "-1.0"),
    ],
)
def test_calculate_is_python_s_arithmetic(text, value):
    assert calculate(text) == value == str(round(float(eval(text, {"__builtins__": None})), 2))


@pytest.mark.parametrize(
    "text",
    ["9**9**9", "(9**999)**9", "1/0", "2(3)", "()", "(1)(2)", "1 2", "007", "x", "__import__('os')", "1.__class__",
     "(" * 200 + ")" * 200, "1" * 501, "-" * 499 + "1" * 2, "(-8)**0.5", "9.**999", "", " ", None, 5, ["1"], {"1": 1}],
)  # fmt: skip
def test_calculate_refuses_everything_else_at_once(text):
    episode = start("retail", "0")
    begin = time.process_time()
    assert episode.call("assistant", "calculate", {"expression": text}).startswith("Error:")
    assert time.process_time() - begin < 1.0


@pytest.mark.slow
def test_importing_reads_no_env_file_and_logs_nothing(tmp_path):
    (tmp_path / ".env").write_text("TAU2_PROBE=read\n")
    code = (
        "import os, sys; from pact_fast.envs.tau2.domains import domain; d = domain('airline').start();"
        "d.tools['assistant']['cancel_reservation'](reservation_id='4WQ150');"
        "assert 'TAU2_PROBE' not in os.environ; assert not [m for m in sys.modules if m.startswith('litellm')]"
    )
    path = os.pathsep.join([os.getcwd(), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


# --- hostile calls


@pytest.mark.hostile
@pytest.mark.parametrize("solo", [False, True])
def test_only_tools_of_the_own_side_can_be_called(solo):
    episode = start("telecom", ROAMING, solo)
    before = state_of(episode)
    inherited = ["__init__", "__class__", "db", "tools", "update_db", "use_tool", "get_db_hash"]
    internal = ["_set_bill_to_paid", "set_data_usage", "break_vpn", "suspend_line_for_overdue_bill", "turn_data_on"]
    names = [*inherited, *internal, "assert_line_status", "", "a" * 10**6]
    for name in [*names, *([] if solo else ["toggle_data", "done"])]:
        episode.ending = None
        episode.calls.clear()
        assert episode.call("assistant", name, {}) == f"Error: Tool '{name}' not found."
    assert state_of(episode) == before
    assert "user" in episode.state.tools and "enable_roaming" not in episode.state.tools["user"]


@pytest.mark.hostile
@pytest.mark.parametrize(
    "arguments",
    [
        {"customer_id": "C1001"},
        {"customer_id": "C1001", "line_id": "L1002", "self": 1},
        {"customer_id": "C1001", "line_id": "L1002", "requestor": "user"},
        {"customer_id": ["C1001"], "line_id": {"x": 1}},
        {"customer_id": None, "line_id": None},
        {"customer_id": "C" * 40_000, "line_id": "L1002"},
        {"customer_id": "C1001", "line_id": "L1002", "x": list(range(100_000))},
        {"customer_id": 10**5000, "line_id": "L1002"},
        {"customer_id": object(), "line_id": "L1002"},
    ],
)
def test_arguments_that_do_not_fit_change_nothing(arguments):
    episode = start("telecom", ROAMING)
    before = state_of(episode)
    answer = episode.call("assistant", "enable_roaming", arguments)
    assert answer.startswith("Error:") and len(answer) < 50_000
    assert state_of(episode) == before


@pytest.mark.hostile
def test_wrong_types_in_records_are_judged_and_never_raise():
    episode = start("airline", "0")
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, float("nan"), 10**4000, {"a": [1]}, "x", None, True):
        arguments = {"reservation_id": "4WQ150", "total_baggages": value, "nonfree_baggages": 0, "payment_id": "x"}
        assert isinstance(episode.call("assistant", "update_reservation_baggages", arguments), str)
        arguments = {"reservation_id": "4WQ150", "passengers": [value]}
        assert isinstance(episode.call("assistant", "update_reservation_passengers", arguments), str)
    episode.ending = "user_stop"
    assert judge(episode, []).reward in (0.0, 1.0)


class Patient:
    """A user who never ends a dialogue."""

    heard = 0

    def reply(self, messages):
        Patient.heard += 1
        return UserTurn("Please go on.")


@pytest.mark.slow
@pytest.mark.hostile
@pytest.mark.parametrize("solo", [True, False])
def test_hostile_outputs_run_nothing_but_tools_of_the_agent_and_end_no_dialogue(solo):
    rng = random.Random(1)
    task = make_task("telecom", ROAMING, solo)
    own = [tool["function"]["name"] for tool in task.tools if tool["function"]["name"] != "done"]
    theirs = [] if solo else list(serve(task).episode.state.tools["user"])
    env = Tau2Solo() if solo else Tau2(lambda role: Patient())
    env.reset(task)
    for name in own:  # imports and reads the same as a first call
        env.call(name, {})
    env.reset(task)
    values = [*VALUES, nested(3000), {"requestor": "user"}, "C1001", "L1002"]
    run: set[str] = set()
    with audited() as events:
        for number in range(2500):
            if env.episode.ending is not None:
                assert env.episode.ending == "too_many_errors"
                env.reset(task)
            if number % 2 or solo:
                name = rng.choice([*NAMES, *own, *theirs])
                keys = rng.sample(
                    ["customer_id", "line_id", "id", "expression", "__class__", "self", "requestor", ""], 2
                )
                result = env.call(name, {key: rng.choice(values) for key in keys})
                assert isinstance(result, str)
                assert name in own or result == f"Error: Tool '{name}' not found.", (name, result)
                run.add(env.episode.calls[-1].name if not env.episode.calls[-1].failed else "")
            else:
                before = Patient.heard
                assert env.respond(hostile_text(rng)) == "Please go on."
                assert Patient.heard == before + 1 and env.episode.ending is None
    assert events == [] and run <= {*own, ""}


def state_of(episode):
    environment = episode.state._environment
    return environment.tools.db.model_dump_json() + environment.user_tools.db.model_dump_json()


def test_schemas_are_those_of_the_package():
    for name, agent, user in [("airline", 14, 0), ("retail", 15, 0), ("telecom", 13, 30)]:
        schemas = domain(name).schemas
        assert (len(schemas["assistant"]), len(schemas["user"])) == (agent, user)
