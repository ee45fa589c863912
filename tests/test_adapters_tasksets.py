"""The adapter of tasksets, which the package verifiers has from 0.4 on, against the real package."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from pact_fast.config import RolloutConfig
from pact_fast.data.types import StopReason
from pact_fast.envs.adapters.verifiers_tasks import has_tasksets
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.rollout.agent import AgentLoop, Job
from tests.support.groups import lookup_chain_renderer
from tests.support.scripted_engine import Script, turn

pytest.importorskip("verifiers", reason="pip install 'verifiers>=0.4'")
if not has_tasksets():
    pytest.skip("this release of verifiers has environments, not tasksets", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TASKSETS = "tests/support/verifiers_tasksets.py"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


def args(name, **rest):
    return {"id": f"{TASKSETS}:{name}", "args": rest}


def says(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def play(texts, index=0, **config):
    given = args("Say", count=2)
    task = environment.get("verifiers").tasks(given, 0).train(0, index + 1)[index]
    env = environment.get("verifiers").factory(given, 5.0)()
    renderer = lookup_chain_renderer()
    engine = Script(renderer, [[turn(renderer, text) for text in texts]])
    limits = RolloutConfig(max_completion_length=4000, max_turn_tokens=500, **config)
    (trajectory,) = AgentLoop(engine, renderer, lambda _: env, limits).run([Job(copy.deepcopy(task), (0, 0))])
    return trajectory


def test_tasks_are_those_of_the_taskset_in_its_order():
    source = environment.get("verifiers").tasks(args("Say", count=2), 0)
    tasks = source.train(1, 3)
    assert [task.id for task in tasks] == ["verifiers_tasksets-1", "verifiers_tasksets-0", "verifiers_tasksets-1"]
    assert tasks[0].prompt == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say 1."}]
    assert source.held_out(5) == []


def test_rewards_and_metrics_are_those_of_the_task_over_the_trace():
    trajectory = play([says("stacker_push", item="a"), "<think>\nHm.\n</think>\n\n0"])
    scores = {"right": 1.0, "pushed": 1.0, "turns": 2.0, "tool_messages": 1.0, "messages": 5.0, "success": 1.0}
    assert trajectory.env_rewards == scores
    assert trajectory.turns[0].observations == ["1 items after 1 calls for 0"]
    assert play(["0"]).env_rewards | {"success": 0.75, "pushed": 0.0} == play(["0"]).env_rewards
    assert play(["7"], index=1).env_rewards["success"] == 0.0


def test_tools_share_the_state_of_their_episode_and_of_no_other():
    calls = [says("stacker_push", item="a", times=2), says("stacker_push", item="b"), "1"]
    first, second = play(calls, index=1), play(calls, index=1)
    expected = [["2 items after 1 calls for 1"], ["3 items after 2 calls for 1"], []]
    assert [turn.observations for turn in first.turns] == [turn.observations for turn in second.turns] == expected


def test_what_is_no_call_of_a_tool_and_what_fails_is_an_observation():
    env = environment.get("verifiers").factory(args("Say"), 5.0)()
    env.reset(environment.get("verifiers").tasks(args("Say"), 0).train(0, 1)[0])
    assert [tool["function"]["name"] for tool in env.tools] == ["stacker_fail", "stacker_push"]
    assert env.tools[1]["function"]["parameters"]["required"] == ["item"]
    assert env.call("push", {}).startswith("error: there is no tool 'push'")
    assert env.call("stacker_fail", {}) == "error: ValueError: on purpose"
    assert env.call("stacker_push", {"times": "many"}).startswith("error: ")


def test_a_limit_is_told_to_the_task():
    trajectory = play([says("stacker_push", item="a")] * 2, max_turns=2)
    assert trajectory.stop_reason is StopReason.MAX_TURNS and trajectory.env_rewards["success"] == 0.25


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Boxed", "BoxedTask needs a container"),
        ("Prepared", "PreparedTask overrides setup"),
        ("Graded", "the score graded of GradedTask needs the sandbox"),
        ("Stopped", "StoppedTask stops or rewrites"),
        ("Endless", "Endless yields tasks without end"),
        ("Empty", "has no tasks"),
        ("Nothing", "is no Taskset"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(name, message):
    with pytest.raises(PactError, match=message):
        environment.get("verifiers").factory(args(name), 5.0)


def test_what_cannot_be_loaded_is_an_error_in_one_line():
    for given, message in (
        ({"id": "no-such-taskset"}, "cannot be loaded.*no-such-taskset"),
        ({"id": "x.py:f"}, "no file x.py"),
        (args("Say", colour="red"), "cannot be loaded.*colour"),
    ):
        with pytest.raises(PactError, match=message) as caught:
            environment.get("verifiers").factory(given, 5.0)
        assert "\n" not in str(caught.value)
