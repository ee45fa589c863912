"""A model that plays the user: it is trained on its context in a rollout, its flaws are found, and it has a separate engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import RolloutConfig, load_config
from pact_fast.data.types import StopReason, ToolCall
from pact_fast.envs.domain.user_quality import leaks, user_flaws
from pact_fast.errors import PactError
from pact_fast.model.tokenizer import train_tokenizer
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.self_play import user_example
from pact_fast.rollout.user_engine import WithFrozenModel
from pact_fast.synthesis.eigendata.generated import DOMAIN, GeneratedHelpdesk, RulesTasks
from pact_fast.train.user_model import BothSides, UserSide
from tests.support.scripted_engine import Script

LIMITS = {"max_turns": 40, "max_turn_tokens": 400, "max_completion_length": 4000, "max_prompt_length": 4000}
CLEAN = {"user_protocol_break": 0.0, "user_premature_stop": 0.0, "user_leak": 0.0}


@pytest.fixture(scope="module")
def tasks():
    return RulesTasks(0, 60, 2)


@pytest.fixture(scope="module")
def renderer(tasks):
    return ChatRenderer(train_tokenizer(BothSides(tasks, UserSide(tasks, made)).train(0, 20), 640))


def made(task=None):
    return GeneratedHelpdesk()


def example(task):
    env = made()
    env.reset(task)
    return user_example(task, env)


def turns_of(renderer, expert):
    said = [(turn.content, turn.calls) for turn in expert.turns] + [(expert.answer, ())]
    return [list(renderer.assistant_turn("", text, calls)[0]) for text, calls in said]


def dialogue(renderer, task, agent=None, user=None, **config):
    """The trajectory of a dialogue in which both sides follow scripts; by default, their examples."""
    agent = turns_of(renderer, task.expert) if agent is None else agent
    user = turns_of(renderer, example(task).expert) if user is None else user
    engine = Script(renderer, {0: agent, 1: user})
    limits = RolloutConfig(**LIMITS | {"user": "policy"} | config)
    (trajectory,) = AgentLoop(engine, renderer, made, limits).run([Job(task, (0,))])
    return trajectory


def test_the_example_of_the_user_is_what_it_sees_and_says_in_a_rollout(renderer, tasks):
    """Token for token, for every issue; the agent's task is solved, and nothing is wrong with the user."""
    issues = set()
    for task in tasks.train(0, 30):
        trajectory = dialogue(renderer, task, train_as="user")
        shown = example(task)
        body = renderer.trace_context(shown, shown.expert, "turns").ids
        answer = renderer.assistant_turn("", shown.expert.answer, [])[0]
        expected = np.concatenate([renderer.prompt_ids(shown.prompt, shown.tools), body, answer])
        seen = np.concatenate([trajectory.prompt_ids, trajectory.ids])
        np.testing.assert_array_equal(seen, expected[: len(seen)])  # the template ends its last turn with a line break
        assert len(expected) - len(seen) <= 1
        assert trajectory.stop_reason is StopReason.USER
        rewards = trajectory.env_rewards
        assert rewards["success"] == 1.0 and {key: rewards[key] for key in CLEAN} == CLEAN
        issues |= set(task.env_args["issues"])
    assert len(issues) == 6


class Watching(Script):
    """Notes who asks, and at which temperature."""

    name, applies_filters, shutdown = "a script", True, None

    def __init__(self, renderer, turns, asked):
        super().__init__(renderer, turns)
        self.asked = asked

    def submit(self, request):
        self.asked.append((request.user, request.temperature))
        super().submit(request)


def test_a_user_with_a_model_of_its_own_speaks_greedily_from_its_own_engine(renderer, tasks):
    task = tasks.train(0, 1)[0]
    asked = []

    turns = {0: turns_of(renderer, task.expert), 1: turns_of(renderer, example(task).expert)}
    engine = WithFrozenModel(Watching(renderer, {0: turns[0]}, asked), Watching(renderer, {1: turns[1]}, asked))
    limits = RolloutConfig(user="model", **LIMITS)
    (trajectory,) = AgentLoop(engine, renderer, made, limits).run([Job(task, (0,), temperature=0.7)])
    assert trajectory.env_rewards["success"] == 1.0
    assert set(asked) == {(False, 0.7), (True, 0.0)}
    assert not {1} & set(engine.policy.contexts) and not {0} & set(engine.frozen.contexts)


def test_a_frozen_agent_speaks_greedily_to_a_user_that_is_trained(renderer, tasks):
    task = tasks.train(0, 1)[0]
    asked = []

    turns = {0: turns_of(renderer, task.expert), 1: turns_of(renderer, example(task).expert)}
    policy, frozen = Watching(renderer, {1: turns[1]}, asked), Watching(renderer, {0: turns[0]}, asked)
    limits = RolloutConfig(user="policy", train_as="user", agent_model="x", **LIMITS)
    loop = AgentLoop(WithFrozenModel(policy, frozen, plays_user=False), renderer, made, limits)
    (trajectory,) = loop.run([Job(task, (0,), temperature=0.7)])
    assert trajectory.env_rewards["success"] == 1.0 and trajectory.stop_reason is StopReason.USER
    assert set(asked) == {(False, 0.0), (True, 0.7)}
    assert set(policy.contexts) == {1} and set(frozen.contexts) == {0}


def test_premature_stops_are_those_that_the_scripted_user_would_not_make(renderer, tasks):
    task = next(task for task in tasks.train(0, 40) if list(task.env_args["issues"]) == ["airplane_mode"])
    stop = list(renderer.assistant_turn("", "###STOP###", [])[0])
    user = turns_of(renderer, example(task).expert)
    trajectory = dialogue(renderer, task, user=[stop])  # instead of its handle
    assert trajectory.env_rewards | CLEAN | {"user_premature_stop": 1.0} == trajectory.env_rewards
    assert trajectory.env_rewards["success"] == 0.0
    trajectory = dialogue(renderer, task, user=[user[0], stop])  # instead of acting
    assert trajectory.env_rewards["user_premature_stop"] == 1.0
    done = list(renderer.assistant_turn("", "All done.", [])[0])
    trajectory = dialogue(renderer, task, agent=[done], user=[stop])  # the agent has ended it
    assert {key: trajectory.env_rewards[key] for key in CLEAN} == CLEAN and trajectory.env_rewards["success"] == 0.0


@pytest.mark.parametrize(
    "said",
    [
        '<tool_call>\n{"name": "find_account", "arguments": {"handle": "x"}}\n</tool_call>',  # a tool of the agent
        "<tool_call>\n{nothing\n</tool_call>",
        "",
        "I say ###STOP### in the middle.",
    ],
)
def test_a_turn_that_no_user_can_take_is_a_protocol_break(renderer, tasks, said):
    task = tasks.train(0, 1)[0]
    turns = [[*renderer.tokenizer.encode(said, add_special_tokens=False), renderer.eot_id]]
    agent = [*turns_of(renderer, task.expert), list(renderer.assistant_turn("", "All done.", [])[0])]  # one more answer
    trajectory = dialogue(renderer, task, agent, [*turns, *turns_of(renderer, example(task).expert)])
    assert trajectory.env_rewards["user_protocol_break"] == 1.0


def test_too_many_tokens_of_the_user_are_a_protocol_break(renderer, tasks):
    task = tasks.train(0, 1)[0]
    trajectory = dialogue(renderer, task, user=[renderer.tokenizer.encode("a" * 4, add_special_tokens=False) * 500])
    assert trajectory.stop_reason is StopReason.MAX_USER_TOKENS
    assert trajectory.env_rewards["user_protocol_break"] == 1.0


def test_a_user_that_gives_away_what_is_to_be_found_leaks(renderer, tasks):
    """Unless the agent has said it before."""
    task = tasks.train(0, 1)[0]
    secret = task.env_args["subject"]
    own = turns_of(renderer, example(task).expert)
    for text, found in ((f"My account is {secret}.", [secret]), ("Use take_payment.", ["take_payment"])):
        told = list(renderer.assistant_turn("", text, [])[0])
        trajectory = dialogue(renderer, task, user=[told, *own[1:]], train_as="user")
        assert trajectory.env_rewards["user_leak"] == 1.0
        env = made()
        env.reset(task)
        assert leaks(env.domain, env.instance, trajectory) == found
        heard = replace(trajectory, opening=f"Is it {text}?")
        assert leaks(env.domain, env.instance, heard) == []


def test_tools_of_the_user_hide_its_device_and_act_on_it(tasks):
    task = next(task for task in tasks.train(0, 40) if list(task.env_args["issues"]) == ["airplane_mode"])
    env = made()
    env.reset(task)
    schema = next(tool["function"] for tool in env.user_tools if tool["function"]["name"] == "set_airplane_mode")
    assert list(schema["parameters"]["properties"]) == ["on"]
    assert env.call_as_user("set_airplane_mode", {"on": False, "device": "another"}) == "Airplane mode is off now."
    assert env.verdict().passed
    assert env.call_as_user("take_payment", {}).startswith("error: there is no tool")


def test_an_expert_dialogue_is_needed(tasks):
    task = replace(tasks.train(0, 1)[0], expert=None)
    with pytest.raises(PactError, match="no dialogue to train the user on"):
        example(task)


def test_settings_that_do_not_fit_are_refused():
    for settings, message in (
        (["rollout.user_model=x"], "only with user=model"),
        (["rollout.user=model", "rollout.engine=vllm"], "user=model runs beside the embedded engine"),
        (["rollout.agent_model=x"], "only with train_as=user"),
        (
            ["rollout.user=policy", "rollout.train_as=user", "rollout.agent_model=x", "rollout.engine=vllm"],
            "agent_model runs beside the embedded engine",
        ),
    ):
        with pytest.raises(PactError, match=message):
            load_config("quickstart", settings)


def test_flaws_of_a_dialogue_by_hand(renderer, tasks):
    """The names are those of the metrics; a dialogue without flaws has zeros."""
    task = tasks.train(0, 1)[0]
    env = made()
    env.reset(task)
    trajectory = dialogue(renderer, task, train_as="user")
    assert user_flaws(env.domain, env.instance, trajectory) == CLEAN
    trajectory.turns[0].attempts = [ToolCall("nothing", {})]
    assert user_flaws(env.domain, env.instance, trajectory)["user_protocol_break"] == 1.0
    assert env.domain.name == DOMAIN
