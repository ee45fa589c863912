"""A language model behind an endpoint plays the user: its context, ends of dialogues, and runs that repeat bit for bit."""

from __future__ import annotations

import functools
import json
import os
import random
import signal

import numpy as np
import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")

from pact_fast.components import Component
from pact_fast.config import RolloutConfig, load_config
from pact_fast.config.changes import fixed_changes
from pact_fast.data.types import StopReason
from pact_fast.errors import PactError
from pact_fast.llm import ReplayMiss
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.users.endpoint import EndpointUsers, user_llm
from pact_fast.users.model import GREETING
from tests.support.desk import TASK, Desk, call, thinking
from tests.support.faults import at_call
from tests.support.groups import lookup_chain_renderer
from tests.support.llm_server import in_turn, llm_server, refused, said
from tests.support.runs import QUICKSTART, RunProcess, metrics
from tests.support.scripted_engine import Script, turn


@pytest.fixture(scope="module")
def renderer():
    return lookup_chain_renderer()


@pytest.fixture(scope="module")
def server():
    with llm_server(lambda body: said("hello")) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(server):
    server.answer = lambda body: said("hello")
    server.bodies.clear()


def run(renderer, server, dialogues, env=Desk, answers=None, user_llm=(), **config):
    """The trajectories of these turns of the agent, with the server as the user."""
    settings = {"model": "m", "base_url": server.url, **dict(user_llm)}
    rollout = RolloutConfig(user="endpoint", user_llm=settings, **config)
    users = EndpointUsers.of(rollout, answers)
    engine = Script(renderer, {k: [turn(renderer, text) for text in texts] for k, texts in enumerate(dialogues)})
    loop = AgentLoop(engine, renderer, lambda task: env(), rollout, users)
    try:
        return loop.run([Job(TASK, (0, k)) for k in range(len(dialogues))])
    finally:
        loop.close()
        users.close()


def tool_call(name, arguments="{}"):
    return {"id": "x", "type": "function", "function": {"name": name, "arguments": arguments}}


AGENT = [
    thinking("Agent thinks.", call("weather")),
    thinking("Agent thinks.", "Seven. <|im_end|>"),
    "And dry. ###STOP###",
    "Bye.",
]


def test_the_endpoint_sees_the_users_side_and_the_agent_what_the_user_says(renderer, server):
    server.answer = in_turn(
        said(None, tool_calls=[tool_call("look_at_phone")]),
        said("Is it ###STOP### dry?"),
        said("Thanks."),
        said("###STOP###"),
    )
    (trajectory,) = run(renderer, server, [AGENT])
    assert trajectory.stop_reason is StopReason.USER and not trajectory.stop_reason.is_truncated
    assert [t.user for t in trajectory.turns] == [None, "Is it ###STOP### dry?", "Thanks.", None]
    heard = trajectory.components == Component.USER
    assert renderer.token_bytes.join(trajectory.ids[heard]).decode() == "Is it ###STOP### dry?Thanks."
    assert not trajectory.sampled[heard].any()
    first, last = server.bodies[0], server.bodies[-1]
    assert [m["role"] for m in first["messages"]] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in first["messages"][1:3]] == [GREETING, TASK.prompt[1]["content"]]
    assert [tool["function"]["name"] for tool in first["tools"]] == ["look_at_phone"]
    assert [m["content"] for m in last["messages"] if m["role"] == "tool"] == ["user's look_at_phone"]
    shown = json.dumps(last)
    assert "And dry. ###STOP###" in shown and "<|im_end|>" not in shown  # the agent's text ends nothing
    for hidden in ("Agent thinks", "agent's weather", "Policy of the desk", "tool_call>"):
        assert hidden not in shown


@pytest.mark.parametrize(
    "reply",
    [
        said("cut off", finish="length"),
        said(""),
        said("no", finish="content_filter"),
        said(None, tool_calls=[tool_call("look_at_phone", "{")]),
    ],
    ids=["cut", "empty", "refused", "no JSON"],
)
def test_an_answer_that_cannot_be_used_ends_its_dialogue_alone(renderer, server, reply):
    fine = in_turn(said("Thanks."), said("###STOP###"))

    def answer(body):
        return reply if "Eight" in json.dumps(body["messages"]) else fine(body)

    server.answer = answer
    failed, other = run(renderer, server, [["Eight."], ["Seven.", "Bye."]])
    assert failed.stop_reason is StopReason.USER_FAILED and failed.stop_reason.is_truncated
    assert other.stop_reason is StopReason.USER and len(other.turns) == 2


def test_a_server_that_does_not_answer_ends_the_run_with_one_line(renderer, server):
    server.answer = lambda body: refused(401)
    with pytest.raises(PactError) as caught:
        run(renderer, server, [["Seven."]])
    assert "\n" not in str(caught.value)


def test_words_of_the_environment_end_the_dialogue_too(renderer, server):
    class Transferring(Desk):
        user_stops = ("###TRANSFER###",)

    server.answer = lambda body: said("Please. ###TRANSFER###")
    (trajectory,) = run(renderer, server, [["Seven."]], env=Transferring)
    assert trajectory.stop_reason is StopReason.USER
    server.answer = in_turn(said("Please. ###TRANSFER###"), said("###STOP###"))
    (trajectory,) = run(renderer, server, [["Seven.", "Eight."]])
    assert trajectory.turns[0].user == "Please. ###TRANSFER###"


def test_equal_dialogues_get_equal_replies_and_a_replay_asks_nobody(renderer, server, tmp_path):
    server.answer = lambda body: said(f"{random.random()}")
    dialogues, limits = [["Seven.", "Eight."]] * 2 + [["Nine.", "Eight."]], {"max_turns": 2}
    first = run(renderer, server, dialogues, answers=tmp_path, **limits)
    assert first[0].turns[0].user == first[1].turns[0].user != first[2].turns[0].user
    asked = len(server.bodies)
    again = run(
        renderer,
        server,
        dialogues,
        answers=tmp_path,
        user_llm={"replay": True, "base_url": "http://nobody:1"},
        **limits,
    )
    assert len(server.bodies) == asked
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
    with pytest.raises(ReplayMiss):
        run(renderer, server, [["Ten."]], answers=tmp_path, user_llm={"replay": True}, **limits)


def test_settings_that_do_not_fit_are_one_line():
    for settings, message in (
        (["rollout.user=endpoint"], "belong together"),
        (["rollout.user_llm={model: m}"], "belong together"),
        (["rollout.user=endpoint", "rollout.user_llm={model: m}", "rollout.train_as=user"], "train_as=user"),
    ):
        with pytest.raises(PactError, match=message):
            load_config("quickstart", settings)
    wrong = load_config("quickstart", ["rollout.user=endpoint", "rollout.user_llm={base_url: 'ftp://x'}"]).rollout
    with pytest.raises(PactError, match=r"rollout\.user_llm: model: .*base_url"):
        user_llm(wrong)
    with pytest.raises(PactError, match="api_key"):
        load_config("quickstart", ["rollout.user=endpoint", "rollout.user_llm={model: m, api_key: abcdefghijkl}"])


def test_a_resumed_run_may_ask_elsewhere_but_nobody_else():
    def config(**values):
        return load_config(
            "quickstart", ["rollout.user=endpoint", f"rollout.user_llm={json.dumps({'model': 'm', **values})}"]
        )

    assert not fixed_changes(config(base_url="http://a/v1"), config(base_url="http://b/v1", timeout=3.0, replay=True))
    assert [key for key, *_ in fixed_changes(config(), config(model="other"))] == ["rollout.user_llm.model"]


CHAIN = """
from pact_fast.envs.lookup_chain import LookupChain

class Asked(LookupChain):
    def user_prompt(self):
        return "You ask. End with ###STOP###."
"""


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_with_an_endpoint_as_user_is_resumed_and_repeated_bit_for_bit(server, tmp_path):
    """The server never says the same twice. What a killed run was told is kept; another run repeats all of it, alone."""
    counter = iter(range(10**6))
    server.answer = lambda body: said(f"More {next(counter)}?")
    (tmp_path / "asked.py").write_text(CHAIN)
    recipe = [*QUICKSTART, f"env.name={tmp_path / 'asked.py'}:Asked", "rollout.user=endpoint", "rollout.max_turns=3",
              "rollout.max_turn_tokens=24", "rollout.max_completion_length=160", "pretrain.steps=40",
              "algorithm.reward.env_weight=1", "algorithm.name=matchtir", "trainer.max_steps=3"]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    inject = functools.partial(at_call, "pact_fast.rollout.agent:AgentLoop.run", 5, kill)  # of step 3
    asks = f"rollout.user_llm={json.dumps({'model': 'm', 'base_url': server.url, 'send_seed': False})}"
    assert RunProcess(killed, asks, recipe=recipe, inject=inject).exit_code() == -signal.SIGKILL
    asked = len(server.bodies)
    RunProcess(killed, asks, recipe=recipe).succeed()
    assert 0 < asked < len(server.bodies)
    replay = {"model": "m", "send_seed": False, "cache_dir": str(killed / "answers"), "replay": True}
    RunProcess(whole, f"rollout.user_llm={json.dumps(replay)}", recipe=recipe).succeed()
    assert metrics(killed) == metrics(whole)
    rollouts = "rollouts/step_000003.jsonl.gz"
    assert (killed / rollouts).read_bytes() == (whole / rollouts).read_bytes()
