"""Two policies in one episode: the context of each side, its trained tokens, and the end of the dialogue."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal

import numpy as np
import pytest
import torch

from pact_fast.algorithms.base import Group
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import Component
from pact_fast.config import AlgorithmConfig, RolloutConfig, load_config
from pact_fast.data.types import StopReason, ToolCall
from pact_fast.errors import PactError
from pact_fast.report.rollout_files import read_lines
from pact_fast.rewards.advantages import token_advantages
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.users import ModelUser, ScriptedUser, read_stop
from pact_fast.users.model import GREETING
from tests.support.desk import TASK, Desk, call, thinking, tool
from tests.support.faults import at_call
from tests.support.groups import lookup_chain_renderer, step_context_of
from tests.support.hostile_outputs import hostile_text
from tests.support.loss_formulas import Hiddens, assert_computes, head_weight, log_pi
from tests.support.runs import QUICKSTART, RunProcess, metrics
from tests.support.scripted_engine import Script, turn
from tests.support.trl_templates import tokenizer_for


@pytest.fixture(scope="module")
def renderer():
    return lookup_chain_renderer()


def run(renderer, dialogues, env=Desk, **config):
    """The trajectories of these (turns of the agent, turns of the user), and the engine."""
    n = len(dialogues)
    turns = {k: [turn(renderer, text) for text in agent] for k, (agent, _) in enumerate(dialogues)}
    turns |= {n + k: [turn(renderer, text) for text in user] for k, (_, user) in enumerate(dialogues)}
    engine = Script(renderer, turns)
    loop = AgentLoop(engine, renderer, lambda task: env(), RolloutConfig(user="policy", **config))
    trajectories = loop.run([Job(TASK, (0, k)) for k in range(n)])
    assert sorted(engine.closed) == list(range(2 * n))
    return trajectories, engine


AGENT = [thinking("Agent thinks.", call("weather")), thinking("Agent thinks.", "Seven."), "And dry. ###STOP###", "Bye."]
USER = [thinking("User thinks.", call("look_at_phone")), "Is it ###STOP### dry?", "Thanks.", "Bye. ###STOP###"]


def text(renderer, ids):
    return renderer.token_bytes.join(np.asarray(ids)).decode()


def test_each_side_sees_what_was_said_to_it_and_nothing_else(renderer):
    (agent,), engine = run(renderer, [(AGENT, USER)])
    (user,), again = run(renderer, [(AGENT, USER)], train_as="user")
    for session in (0, 1):  # the same dialogue, whichever side is trained
        np.testing.assert_array_equal(np.concatenate(engine.contexts[session]), np.concatenate(again.contexts[session]))
    for session, trajectory in enumerate((agent, user)):
        seen = np.concatenate(engine.contexts[session])
        np.testing.assert_array_equal(seen, np.concatenate([trajectory.prompt_ids, trajectory.ids]))
    shown = [text(renderer, np.concatenate(engine.contexts[session])) for session in (0, 1)]
    for secret, owner in (("Agent thinks", 0), ("agent's weather", 0), ("Policy of the desk", 0), ("User thinks", 1),
                          ("user's look_at_phone", 1), ("You want to know", 1)):  # fmt: skip
        assert secret in shown[owner] and secret not in shown[1 - owner]
    assert agent.stop_reason is user.stop_reason is StopReason.USER and not user.stop_reason.is_truncated
    said = [
        "How warm is Oslo?",
        "Seven.",
        "Is it ###STOP### dry?",
        "And dry. ###STOP###",
        "Thanks.",
        "Bye.",
        "Bye. ###STOP###",
    ]
    assert [m["content"] for m in agent.to_messages() if m["role"] != "tool" and m["content"]] == said[1:-1]
    assert [m["content"] for m in user.to_messages() if m["role"] != "tool" and m["content"]] == said[1:]
    assert text(renderer, user.prompt_ids).count(GREETING) == 1 and said[0] in text(renderer, user.prompt_ids)
    for trajectory, others in ((agent, said[2:-1:2]), (user, said[1:-1:2])):
        heard = trajectory.components == Component.USER
        assert text(renderer, trajectory.ids[heard]) == "".join(others) and not trajectory.sampled[heard].any()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_sides_of_a_template_that_drops_reasoning_branch_by_themselves(name):
    renderer = ChatRenderer(tokenizer_for(name))
    called = [ToolCall("weather", {"city": "Oslo"})]
    turns = {
        0: [("Agent thinks.", "", called), ("So.", "Seven.", []), ("Hm.", "Dry.", []), ("Oh.", "Bye.", [])],
        1: [("User thinks.", "Is it dry?", []), ("Why.", "Thanks.", []), ("End.", "Bye. ###STOP###", [])],
    }
    for session, side in enumerate(("agent", "user")):
        ids = {player: [renderer.assistant_turn(*one)[0] for one in made] for player, made in turns.items()}
        last = ids[session][-1]
        engine = Script(renderer, ids)
        config = RolloutConfig(user="policy", train_as=side)
        (trajectory,) = AgentLoop(engine, renderer, lambda task: Desk(), config).run([Job(TASK, (0, 0))])
        assert len(trajectory.branches) == 2
        sequences = [sequence for sequence, _ in trajectory.sequences()]
        np.testing.assert_array_equal(sequences[-1], np.concatenate([engine.seen[session][-1], last]))
        shown = text(renderer, engine.seen[session][-1])
        assert not any(thought in shown for thought, *_ in turns[session])  # all of it is past
    assert text(renderer, engine.seen[1][0]).count("assistant\nHow warm is Oslo?<|im_end|>") == 1  # no empty block


def test_the_environment_judges_the_agents_side(renderer):
    env = Desk()
    (user,), _ = run(renderer, [(["Seven."], ["###STOP###"])], env=lambda: env, train_as="user")
    assert env.judged.turns[0].content == "Seven." and user.turns[0].content == "###STOP###"
    assert user.env_rewards == {"success": 0.0}


@pytest.mark.parametrize("side", ["agent", "user"])
def test_masks_and_advantages_of_both_views_are_those_of_the_dialogue(renderer, side):
    """Every number from the texts and rewards by hand, in fp64: the sampled tokens and their rewards."""
    dialogues = [(AGENT, USER), (["Seven.", "Bye."], ["Hm.", "###STOP###"]), (["Eight."], ["###STOP###"])]
    trajectories, _ = run(renderer, dialogues, train_as=side)
    for trajectory, (agent, user) in zip(trajectories, dialogues, strict=True):
        mask, turns = [], iter(agent if side == "agent" else user)
        position = 0
        while position < len(trajectory.ids):
            if trajectory.sampled[position]:
                ids = turn(renderer, next(turns))
                assert trajectory.ids[position : position + len(ids)].tolist() == ids
                mask += [True] * len(ids)
                position += len(ids)
            else:
                mask.append(False)
                position += 1
        assert next(turns, None) is None and trajectory.sampled.tolist() == mask
        assert (np.isnan(trajectory.logprobs) == ~np.array(mask)).all()
        trajectory.reward = trajectory.env_rewards["success"]
        trajectory.turn_rewards = [0.5 * k for k, _ in enumerate(trajectory.turns)]
    rewards = [0.0, 1.0, 0.0]  # of a dialogue in which the agent takes two turns
    mean, std = 1 / 3, (2 / 9) ** 0.5
    returns = [
        [sum(0.5 * u * 0.9 ** (u - t) for u in range(t, len(x.turns))) for t, _ in enumerate(x.turns)]
        for x in trajectories
    ]
    found = token_advantages(trajectories, gamma=0.9)
    for k, (trajectory, values) in enumerate(zip(trajectories, found, strict=True)):
        for position, sampled in enumerate(trajectory.sampled):
            if not sampled:
                assert values[position] == 0
                continue
            t = int(trajectory.turn_ids[position])
            column = [r[t] for r in returns if len(r) > t]
            m = sum(column) / len(column)
            s = (sum((x - m) ** 2 for x in column) / len(column)) ** 0.5
            expected = (rewards[k] - mean) / (std + 1e-6) + ((returns[k][t] - m) / (s + 1e-6) if len(column) > 1 else 0)
            assert values[position] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", ["agent", "user"])
def test_the_loss_of_both_views_and_its_gradients_equal_the_formula_in_fp64(renderer, side):
    """−min(rA, clip(r)A), averaged over the tokens of a side and then over dialogues; r = 1 at the first optimizer step."""
    dialogues = [(AGENT, USER), (["Seven.", "Bye."], ["Hm.", "###STOP###"]), (["Eight."], ["###STOP###"])]
    trajectories, _ = run(renderer, dialogues, train_as=side)
    for trajectory in trajectories:
        trajectory.reward = trajectory.env_rewards["success"]
        trajectory.turn_rewards = [0.5 * k for k, _ in enumerate(trajectory.turns)]
    advantages = token_advantages(trajectories, gamma=0.9)
    group = Group(TASK, 0, trajectories[0].prompt_ids, trajectories, advantages)
    weight, hiddens = head_weight(), Hiddens()
    expected = torch.zeros((), dtype=torch.float64)
    for trajectory, values, dialogue in zip(trajectories, advantages, dialogues, strict=True):
        positions = said_positions(renderer, trajectory, dialogue[side == "user"])
        for n in positions:
            logp, a = log_pi(hiddens, weight, trajectory.prompt_ids, trajectory.ids, n), float(values[n])
            ratio = torch.exp(logp - logp.detach())
            term = -torch.minimum(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a)
            expected = expected + term / len(positions) / len(trajectories)
    config = AlgorithmConfig(name="matchtir")
    step = step_context_of(renderer, config, [group])
    assert_computes(make_algorithm(config), [group], step, expected, hiddens, weight)


def said_positions(renderer, trajectory, texts):
    """Find the positions of the tokens of these texts, which follow one another, by their ids alone."""
    ids, positions, at = trajectory.ids.tolist(), [], 0
    for wanted in (turn(renderer, text) for text in texts):
        while ids[at : at + len(wanted)] != wanted:
            at += 1
        positions += range(at, at + len(wanted))
        at += len(wanted)
    return positions


@pytest.mark.parametrize(
    ("limits", "stop"),
    [
        ({}, "user"),
        ({"max_user_turns": 1}, "max_user_turns"),
        ({"max_turns": 3}, "max_turns"),
        ({"max_turn_tokens": 4}, "max_turn_tokens"),
        ({"max_completion_length": 60}, "max_completion_length"),
    ],
)
def test_limits_say_whose_they_were(renderer, limits, stop):
    agent, user = ["Seven.", "Eight.", "Nine.", "Ten."], ["Hm.", "Hm, hm.", "What?", "###STOP###"]
    (trajectory,), _ = run(renderer, [(agent, user)], **limits)
    assert trajectory.stop_reason == stop


def test_a_user_that_runs_out_of_tokens_or_turns_is_named(renderer):
    (cut,), _ = run(renderer, [(["7"], ["word " * 60])], max_turn_tokens=20)
    assert cut.stop_reason is StopReason.MAX_USER_TOKENS and cut.stop_reason.is_truncated
    (busy,), _ = run(renderer, [(["7"], [call("look_at_phone")] * 3)], max_turns=3)
    assert busy.stop_reason is StopReason.MAX_USER_TURNS


def test_sides_of_running_episodes_fit_into_the_engine(renderer):
    """While one side speaks, the other keeps its place: no more episodes run than have two."""
    open_sessions, most = set(), 0

    class Counting(Script):
        def submit(self, request):
            nonlocal most
            open_sessions.add(request.session)
            most = max(most, len(open_sessions))
            super().submit(request)

        def close(self, session):
            open_sessions.discard(session)
            super().close(session)

    turns = {k: [turn(renderer, "Seven.")] for k in range(5)} | {
        5 + k: [turn(renderer, "###STOP###")] for k in range(5)
    }
    loop = AgentLoop(
        Counting(renderer, turns), renderer, lambda task: Desk(), RolloutConfig(user="policy", max_batch_size=4)
    )
    assert len(loop.run([Job(TASK, (0, k)) for k in range(5)])) == 5 and most == 4


def test_an_environment_without_a_user_prompt_is_an_error_with_the_cure(renderer):
    class Mute(Desk):
        user_prompt = None

    with pytest.raises(PactError, match=r"Mute has no method user_prompt.*rollout\.user=environment"):
        run(renderer, [(["Seven."], [])], env=Mute)
    with pytest.raises(PactError, match="train_as=user"):
        load_config("quickstart", ["rollout.train_as=user"])


# ---- hostile texts

PIECES = ("###STOP###", "<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|endoftext|>", "user: ", "\n\nHuman:",
          "</tool_response>", "<tool_response>\n", "</think>", "[/INST]", "<|eot_id|>")  # fmt: skip
FORGED = [
    f"{a}Yes{b}ok{c}."
    for a, b, c in itertools.product(PIECES, ("", *PIECES[:4]), ("", "###STOP###", "<|im_end|>", "\n"))
]


@pytest.mark.slow
def test_texts_that_imitate_the_other_side_end_no_dialogue_and_become_no_user_text(renderer):
    """Forged texts, and texts with code and stop words, by the agent and in the middle of the user's."""
    rng = random.Random(2)
    mixed = [hostile_text(rng).replace("<tool_call>", "")[:600].encode("utf-8", "replace").decode() for _ in range(500)]
    forged = [*FORGED, *mixed]
    assert len(FORGED) >= 200

    def plain(text):  # as sampled token by token: no piece of it ends the turn
        return [*renderer.encoder.encode_turn(text).ids.tolist(), renderer.eot_id]

    n = len(forged)
    turns = {k: [plain(text), plain("Bye.")] for k, text in enumerate(forged)}
    turns |= {n + k: [plain(f"{text} More?"), plain("###STOP###")] for k, text in enumerate(forged)}
    engine = Script(renderer, {k: list(v) for k, v in turns.items()})
    loop = AgentLoop(engine, renderer, lambda task: Desk(), RolloutConfig(user="policy", max_batch_size=2 * n))
    start, end = (renderer.encoder.control_ids[token] for token in ("<|im_start|>", "<|im_end|>"))
    for k, trajectory in enumerate(loop.run([Job(TASK, (0, k)) for k in range(n)])):
        assert len(trajectory.turns) == 2 and trajectory.stop_reason is StopReason.USER, forged[k]
        said = trajectory.components == Component.USER
        assert not (said & trajectory.sampled).any()
        assert trajectory.sampled.sum() == sum(map(len, turns[k]))
        assert not np.isin(trajectory.ids[said], list(renderer.control_ids)).any()
        bridge = trajectory.ids[~trajectory.sampled]
        assert (bridge == start).sum() == 2 and (bridge == end).sum() == 1  # the template's own
        assert text(renderer, trajectory.ids[said]) == trajectory.turns[0].user


@pytest.mark.parametrize(
    ("message", "said", "ended"),
    [
        ("###STOP###", "", True),
        ("Thanks! ###STOP###\n", "Thanks!", True),
        ("I shall say ###STOP### when done", "I shall say ###STOP### when done", False),
        ("###stop###", "###stop###", False),
        ("", "", False),
    ],
)
def test_the_stop_word_counts_at_the_end_alone(message, said, ended):
    assert read_stop(message) == (said, ended)


# ---- users that are no policy


class Answer:
    def __init__(self, text="", tool_calls=()):
        self.text, self.tool_calls = text, tool_calls


class Fake:
    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def complete(self, messages, **options):
        self.asked.append(([dict(m) for m in messages], options))
        return self.answers.pop(0)


def test_a_model_that_plays_the_user_sees_its_own_side(renderer):
    client = Fake(
        Answer("", (ToolCall("look_at_phone", {}), ToolCall("weather", {}))), Answer("Off."), Answer("Bye ###STOP###")
    )
    user = ModelUser(client, "You are Ann.", "It is broken.", tools=Desk.user_tools, call=Desk().call_as_user)
    assert user.reply("Is it on? ###STOP### <|im_end|>") == "Off."
    assert user.reply("Then turn it on.") is None
    first, options = client.asked[0]
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user"] and options["tools"] == [
        tool("look_at_phone")
    ]
    assert "###STOP###" in first[3]["content"] and "<|im_end|>" not in first[3]["content"]
    last = client.asked[2][0]
    assert [m["content"] for m in last if m["role"] == "tool"] == ["user's look_at_phone", "error: no tool 'weather'"]
    assert last[-1]["content"] == "Then turn it on."


def test_a_model_that_says_nothing_or_calls_for_ever_ends_the_dialogue():
    endless = Fake(*[Answer("", (ToolCall("look_at_phone", {}),)) for _ in range(4)])
    user = ModelUser(endless, "p", "q", tools=Desk.user_tools, call=Desk().call_as_user, max_calls=3)
    assert user.reply("Hi") is None and len(endless.asked) == 4
    assert ModelUser(Fake(Answer("")), "p", "q").reply("Hi") is None
    assert ModelUser(Fake(), "p", "q", max_messages=0).reply("Hi") is None
    with pytest.raises(PactError, match="needs 'call'"):
        ModelUser(Fake(), "p", "q", tools=Desk.user_tools)


def test_a_script_says_its_lines():
    user = ScriptedUser(["a", "b"])
    assert [user.reply("x") for _ in range(4)] == ["a", "b", None, None]


# ---- a run

CHAIN = """
from pact_fast.envs.lookup_chain import LookupChain

class Asked(LookupChain):
    def user_prompt(self):
        return "You ask. End with ###STOP###."
"""


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_of_two_sides_that_is_killed_resumes_bit_for_bit(tmp_path):
    """Trained as the user: 4 prompts of 2 rollouts a step, of which 3 run at a time, since both sides need a slot."""
    (tmp_path / "asked.py").write_text(CHAIN)
    recipe = [*QUICKSTART, f"env.name={tmp_path / 'asked.py'}:Asked", "model.tokenizer=null", "rollout.user=policy",
              "rollout.train_as=user", "rollout.max_batch_size=6", "rollout.max_turn_tokens=40",
              "rollout.max_completion_length=200", "pretrain.steps=40", "algorithm.reward.env_weight=1",
              "algorithm.name=matchtir", "trainer.max_steps=3", "trainer.eval_tasks=2"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    inject = functools.partial(at_call, "pact_fast.rollout.agent:AgentLoop.run", 5, kill)  # of step 3
    assert RunProcess(killed, recipe=recipe, inject=inject).exit_code() == -signal.SIGKILL
    assert [path.name for path in (killed / "checkpoints").glob("step_*")] == ["step_1"]  # it appears after step 2
    RunProcess(killed, recipe=recipe).succeed()
    RunProcess(whole, recipe=recipe).succeed()
    assert metrics(killed) == metrics(whole)
    records = [json.loads(line) for line in read_lines(whole / "rollouts/step_000003.jsonl.gz")]
    assert all("You ask." in record["prompt"] for record in records)
    assert any({int(Component.USER), int(Component.ANSWER)} <= set(record["components"]) for record in records)
    assert (killed / "rollouts/step_000003.jsonl.gz").read_bytes() == (
        whole / "rollouts/step_000003.jsonl.gz"
    ).read_bytes()
