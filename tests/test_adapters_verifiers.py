"""The adapter of the package verifiers, against its own rollouts and rubrics."""

from __future__ import annotations

import asyncio
import copy
import json
import signal
from pathlib import Path

import pytest

from pact_fast.config import RolloutConfig
from pact_fast.data.types import StopReason, Task
from pact_fast.envs.base import has_user
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.rollout.agent import AgentLoop, Job
from tests.support.groups import lookup_chain_renderer
from tests.support.optional import needs
from tests.support.scripted_engine import Script, turn

needs("verifiers", reason="pip install 'verifiers<0.4'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ENVS = "tests/support/verifiers_envs.py"


@pytest.fixture(autouse=True, scope="module")
def known_release():
    import verifiers

    if not hasattr(verifiers, "load_environment"):
        pytest.skip("this release of verifiers has no load_environment")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


def args(name, **rest):
    return {"id": f"{ENVS}:{name}", "args": rest}


def says(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def play(name, texts, row=0, **rest):
    """(trajectory, task, environment) of these turns on a row of the environment's dataset."""
    given = args(name, **rest)
    task = environment.get("verifiers").tasks(given, 0).train(0, row + 1)[row]
    env = environment.get("verifiers").factory(given, 5.0)()
    renderer = lookup_chain_renderer()
    engine = Script(renderer, [[turn(renderer, text) for text in texts]])
    config = RolloutConfig(max_completion_length=4000, max_turn_tokens=500)
    (trajectory,) = AgentLoop(engine, renderer, lambda _: env, config).run([Job(copy.deepcopy(task), (0, 0))])
    return trajectory, task, env


class Scripted:
    """A client of the package that says `turns`: (text, calls)."""

    def __new__(cls, turns):
        from verifiers.clients import Client
        from verifiers.types import Response, ResponseMessage, ToolCall

        class Fixed(Client):
            async def get_response(self, prompt, model, tools, sampling_args, state, **kwargs):
                text, calls = turns.pop(0)
                made = [ToolCall(id=f"c{i}", name=n, arguments=json.dumps(a)) for i, (n, a) in enumerate(calls)]
                message = ResponseMessage(
                    content=text, tool_calls=made or None, finish_reason="stop", is_truncated=False
                )
                return Response(id="r", created=0, model=model, message=message)

        Fixed.__abstractmethods__ = frozenset()
        return object.__new__(Fixed)


def reference(name, turns, row=0, **rest):
    """The package's own rollout and score of these turns."""
    import tests.support.verifiers_envs as envs

    env = getattr(envs, name)(**rest)
    given = env.get_dataset()[row]

    async def roll():
        state = await env.rollout(given, Scripted(list(turns)), "m", {})
        await env.rubric.score_rollout(state)
        return state

    return asyncio.run(roll())


def said(messages):
    """(role, text) of messages of either kind."""
    plain = [m if isinstance(m, dict) else m.model_dump() for m in messages]
    return [(m["role"], m["content"] or "") for m in plain]


CASES = [
    ("single", ["0"], [("0", [])]),
    ("single", ["1"], [("1", [])]),
    ("tools", [says("echo", text="a"), "0"], [("", [("echo", {"text": "a"})]), ("0", [])]),
    (
        "tools",
        ["\n".join([says("echo", text="a"), says("echo", text="b")]), "0"],
        [("", [("echo", {"text": "a"}), ("echo", {"text": "b"})]), ("0", [])],
    ),
    (
        "stateful",
        ["\n".join(says("push", item=x) for x in "ab"), says("push", item="c"), "never"],
        [("", [("push", {"item": x}) for x in "ab"]), ("", [("push", {"item": "c"})]), ("never", [])],
    ),
    ("asks", ["hello", "again", "bye", "never"], [("hello", []), ("again", []), ("bye", []), ("never", [])]),
]


@pytest.mark.parametrize(("name", "texts", "turns"), CASES)
def test_episodes_and_rewards_are_those_of_the_package(name, texts, turns):
    trajectory, _, _ = play(name, texts)
    state = reference(name, turns)
    assert trajectory.env_rewards == {**state["metrics"], "success": state["reward"]}
    ours, theirs = said(trajectory.to_messages()), said(state["completion"])
    # the package records the response after which it ends an episode; the policy would never have read it
    assert ours == theirs[: len(ours)] and len(theirs) - len(ours) <= 1


def test_the_limit_of_turns_of_the_environment_ends_the_episode():
    trajectory, _, _ = play("tools", [says("echo", text="a")] * 5, max_turns=2)
    state = reference("tools", [("", [("echo", {"text": "a"})])] * 5, max_turns=2)
    assert len(trajectory.turns) == len(state["trajectory"]) == 2
    assert trajectory.stop_reason is StopReason.ENVIRONMENT
    assert trajectory.env_rewards["turns"] == state["metrics"]["turns"] == 2.0


def test_rows_become_tasks_and_their_columns_reach_the_environment():
    source = environment.get("verifiers").tasks(args("asks"), 0)
    tasks = source.train(0, 3) + source.train(1, 3)
    assert [t.answer for t in tasks] == ["0", "1", "2", "3", "0", "1"] and len({t.id for t in tasks}) == 4
    assert source.held_out(9) == []  # it has no evaluation rows
    trajectory, _, _ = play("asks", ["hello", "bye"], row=2)
    assert trajectory.turns[0].user == "1: hello (2)"
    trajectory, task, env = play("single", ["0"])
    assert task.prompt[0] == {"role": "system", "content": "Be brief."} and not has_user(env)
    from_file = Task("f", task.prompt, answer="7", columns={"info": {"level": 9}})
    env = environment.get("verifiers").factory(args("asks"), 5.0)()
    env.reset(from_file)
    assert env.respond("hello") == "1: hello (9)"


def test_a_task_without_tools_passes_the_doctor_and_a_rollout_has_a_state_of_its_own():
    make_env = environment.get("verifiers").factory(args("stateful"), 5.0)
    task = environment.get("verifiers").tasks(args("stateful"), 0).train(0, 1)[0]
    one, two = make_env(), make_env()
    for env in (one, two):
        env.reset(task)
    seen = [one.call("push", {"item": "a"}), one.call("push", {"item": "b"}), two.call("push", {"item": "a"})]
    assert seen == ["1", "2", "1"] and "stack" not in json.dumps(one.tools)
    assert one.call("push", {"item": "a", "stack": ["x", "y"]}) == "3"  # the environment's own stack
    assert one.needs_tools is False


def test_the_handlers_of_signals_stay_those_of_the_run():
    from pact_fast.envs.adapters import verifiers

    verifiers._loaded.cache_clear()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    environment.get("verifiers").factory(args("single"), 5.0)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_loop", "OwnLoop overrides get_prompt_messages"),
        ("group", "compares the rollouts of a group"),
        ("nothing", "int is no MultiTurnEnv"),
    ],
)
def test_unsupported_environments_are_refused_with_the_reason(name, message):
    with pytest.raises(PactError, match=message):
        environment.get("verifiers").factory(args(name), 5.0)


def test_what_cannot_be_loaded_is_an_error_in_one_line():
    for id, message in (("no-such-environment", "cannot be loaded.*no-such-environment"), ("x.py:f", "no file x.py")):
        with pytest.raises(PactError, match=message):
            environment.get("verifiers").factory({"id": id}, 5.0)
    with pytest.raises(PactError, match="an image or a sound"):
        environment.get("verifiers").tasks(args("pictures"), 0).train(0, 1)
