"""Domains: the copy-on-write database, tools, the scripted user, and episodes of the environment."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from pact_fast.config import RolloutConfig, load_config
from pact_fast.data.types import StopReason, Task, Trajectory, TurnRecord
from pact_fast.envs.base import Environment
from pact_fast.envs.domain import Checker, Database, Domain, DomainEnvironment, Instance, Step, ToolError, User
from pact_fast.envs.domain.checker import state_difference
from pact_fast.envs.domain.controls import check_instance
from pact_fast.envs.domain.env import OVER, instance_task
from pact_fast.envs.domain.instance import Rule
from pact_fast.envs.domain.tools import call_tool
from pact_fast.envs.helpdesk import HelpdeskEnvironment
from pact_fast.envs.python_tools.pool import SandboxPool
from pact_fast.envs.registry import EnvironmentFactory
from pact_fast.errors import DataError, PactError
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.synthesis.eigendata.rollout import gold_acts, play
from tests.support import eigendata as support
from tests.support.groups import lookup_chain_renderer
from tests.support.scripted_engine import Script

BASE = {"jars": {"a": {"n": 1, "tags": ["x"]}, "b": {"n": 2, "tags": []}}, "log": {}}


def ended(stop: StopReason = StopReason.ANSWER, answer: str = "") -> Trajectory:
    none = np.zeros(0)
    return Trajectory("t", none, none, none, none, none, none, none, [TurnRecord("", "", answer)], stop)


def test_the_database_copies_at_first_touch_and_never_changes_its_base():
    before = copy.deepcopy(BASE)
    db, other = Database(BASE), Database(BASE)
    db["jars"]["a"]["tags"].append("y")
    db["jars"]["c"] = {"n": 3, "tags": []}
    del db["jars"]["b"]
    assert before == BASE and other["jars"]["a"]["tags"] == ["x"] and other.changes() == {}
    assert list(db["jars"]) == ["a", "c"] and "b" not in db["jars"] and len(db["jars"]) == 2
    assert db.changes() == {"jars": {"a": {"n": 1, "tags": ["x", "y"]}, "b": None, "c": {"n": 3, "tags": []}}}
    assert db["jars"].find(n=3) == ["c"] and db["jars"].find(n=2) == []
    db["jars"]["a"]["tags"].remove("y")  # back to the old value: no change, so equal states have equal digests
    del db["jars"]["c"]
    db["jars"]["b"] = {"n": 2, "tags": []}
    assert db.changes() == {} and db.digest() == other.digest()


def test_reading_a_record_is_not_a_change():
    db = Database(BASE)
    assert db["jars"]["a"]["n"] == 1 and db["jars"].peek("b")["n"] == 2 and db.changes() == {}


def test_a_failed_call_changes_nothing_and_never_raises():
    def spill(db: Database, jar: str) -> None:
        db["jars"][jar]["n"] = 0
        db["jars"]["new"] = {"n": 9}
        raise ToolError("too heavy")

    def bug(db: Database, jar: str) -> None:
        db["jars"][jar]["n"] = 1 / 0

    db = Database(BASE)
    db["jars"]["a"]["n"] = 5
    for name, text in (("spill", "error: too heavy"), ("bug", "error: ZeroDivisionError: division by zero")):
        assert call_tool({"spill": spill, "bug": bug}, db, name, {"jar": "a"}) == (text, False)
    assert call_tool({}, db, "x", {}) == ("error: there is no tool 'x'", False)
    assert call_tool({"bug": bug}, db, "bug", {"wrong": 1})[0].startswith("error: TypeError")
    assert db.changes() == {"jars": {"a": {"n": 5, "tags": ["x"]}}}


def test_states_are_compared_up_to_the_rules():
    left, right = Database(BASE), Database(BASE)
    left["jars"]["a"]["tags"], right["jars"]["a"]["tags"] = [3, 1.5, 1.5], [1.5, 3, 1.5]
    left["log"]["1"] = {"text": "only here"}
    assert state_difference(left, right, ()) == "jars.a tags is [3, 1.5, 1.5], expected [1.5, 3, 1.5]"
    log = Rule("ignore", "log")
    assert state_difference(left, right, (log, Rule("unordered", "jars", "tags"))) is None
    right["jars"]["a"]["tags"] = [6]
    assert state_difference(left, right, (log, Rule("total", "jars", "tags"))) is None
    assert state_difference(left, right, (Rule("ignore", "jars", "tags"),)) == "log.1 should not exist"


def test_schemas_come_from_the_functions_and_hide_the_database():
    by_name = {schema["function"]["name"]: schema["function"] for schema in support.helpdesk().schemas}
    assert len(by_name) == 14 and len(support.helpdesk().user) == 6
    parameters = by_name["add_data"]["parameters"]
    assert parameters["required"] == ["account_id", "gigabytes"]
    assert parameters["properties"]["gigabytes"]["type"] == "integer"


@pytest.fixture(scope="module")
def instance() -> Instance:
    found = support.instances(support.helpdesk(), 64, seed=1, issues=2)
    return next(i for i in found if {"locked_sim", "refund_order"} <= set(i.issues))


def test_an_episode_by_hand(instance):
    env = HelpdeskEnvironment()
    task = instance_task(support.helpdesk(), instance, "helpdesk")
    assert isinstance(env, Environment) and env.reset(task) is None and len(env.tools) == 14
    number = env.respond("May I have your phone number, please?")
    assert number == f"My phone number is {instance.user.knows['phone number']}."
    assert "locked" in env.respond("Please tell me what your phone shows.")
    for step in instance.gold:
        if step.by == "agent":
            assert not env.call(step.name, dict(step.arguments)).startswith("error"), step
    assert env.respond("Could you reboot the phone now?") == "I restarted the phone."
    for act in gold_acts(support.helpdesk(), instance):
        if isinstance(act, str) and act.startswith("Please turn"):
            assert env.respond(act).endswith("now.")
    for step in instance.gold:
        if step.name == "reseat_sim":
            env.respond("Please remove the SIM card and insert it again.")
    assert env.reward(task, ended())["said"] == 0.0
    assert env.respond(f"You get ${instance.checker.say[0]} back. Anything else?") is None
    reward = env.reward(task, ended())
    assert reward["state"] == reward["assertions"] == 1.0
    assert reward["said"] == float(len(instance.checker.say) == 1)
    assert env.call("get_account", {"account_id": instance.subject}) == OVER
    assert env.reward(task, ended(StopReason.MAX_TURNS))["success"] == 0.0


def test_gold_passes_and_doing_nothing_fails_and_the_instance_serves_another_task():
    domain = support.helpdesk()
    for instance in support.instances(domain, 12, seed=9):
        first = play(domain, instance, gold_acts(domain, instance))
        assert first.passed and first.messages == play(domain, instance, gold_acts(domain, instance)).messages
        assert not play(domain, instance, iter(["All done."])).passed
        assert not play(domain, instance, gold_acts(domain, instance), max_messages=4).passed


def test_a_user_who_does_not_understand_gives_up_and_a_hand_over_ends_the_dialogue(instance):
    env = HelpdeskEnvironment()
    env.reset(instance_task(support.helpdesk(), instance, "helpdesk"))
    answers = [env.respond("Colourless green ideas.") for _ in range(instance.user.patience + 1)]
    assert answers[-1] is None and all(text.startswith("Sorry") for text in answers[:-1]) and env.user.gave_up
    env.reset(instance_task(support.helpdesk(), instance, "helpdesk"))
    assert env.call("transfer_to_human", {"summary": "x"}) == "handed over"
    assert env.respond("Bye") is None and env.call("find_account", {"phone_number": "1"}) == OVER


def test_rows_play_in_the_environment_that_they_name(instance, tmp_path):
    config = load_config("quickstart", ["env.name=helpdesk", "env.args={}"])
    task = instance_task(support.helpdesk(), instance, "helpdesk")
    made = EnvironmentFactory(config)(task)
    assert isinstance(made, HelpdeskEnvironment)
    with pytest.raises(DataError, match=r"of the domain 'shop'"):
        made.reset(Task("t", [], env_args={**task.env_args, "domain": "shop"}))
    with pytest.raises(DataError, match="no instance of a domain: KeyError"):
        DomainEnvironment.check_task(Task("t", [], env_args={"gold": []}))
    with pytest.raises(PactError, match="name a domain"):
        DomainEnvironment()


@pytest.mark.parametrize("weak", [False, True])
def test_the_agent_loop_plays_a_dialogue_and_gets_the_verdict(instance, weak):
    """Turns of the gold dialogue as a model would write them; without its repairs, the dialogue is the same and fails."""
    domain, renderer = support.helpdesk(), lookup_chain_renderer()
    dialogue = play(domain, instance, gold_acts(domain, instance)).messages
    task = instance_task(domain, instance, "helpdesk", dialogue)
    expert = [(turn.content, turn.calls) for turn in task.expert.turns] + [(task.expert.answer, ())]
    repairs = {"unlock_sim", "refund_order"} if weak else set()
    kept = [(text, calls) for text, calls in expert if not repairs & {call.name for call in calls}]
    turns = [list(renderer.assistant_turn("", text, calls)[0]) for text, calls in kept]
    limits = RolloutConfig(max_turns=60, max_completion_length=20_000, max_prompt_length=20_000)
    loop = AgentLoop(Script(renderer, {0: turns}), renderer, lambda task: HelpdeskEnvironment(), limits)
    (trajectory,) = loop.run([Job(task, (0,))])
    assert trajectory.stop_reason is StopReason.ENVIRONMENT
    assert trajectory.env_rewards["success"] == float(not weak) and trajectory.env_rewards["said"] == 1.0
    if not weak:
        assert [turn.user for turn in trajectory.turns if turn.user] == [
            message["content"] for message in dialogue[2:] if message["role"] == "user"
        ]


SHOP = '''
from pact_fast.envs.domain import Domain

def sell(db, item: str) -> str:
    """Sell an item.

    Args:
        item: Which.
    """
    db["stock"][item]["left"] -= 1
    return "sold"

class Shop(Domain):
    name, policy = "shop", "Sell what is wanted."
    base = {"stock": {"pen": {"left": 3}, "cup": {"left": 1}}}
    agent_tools = (sell,)
'''


@pytest.mark.slow
def test_a_domain_of_ones_own_with_a_checker_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(SHOP)
    source = "def check(state, said):\n    return state.get('stock', {}).get('pen', {}).get('left') == 2 and 'sold' in said[0]"
    instance = Instance(
        "s1", "shop", "", (), (), User("A pen, please.", goal="A pen."), (Step("sell", {"item": "pen"}),),
        Checker(compare=False, function=source, say=("sold",)),
    )  # fmt: skip
    with SandboxPool(workers=1) as pool:
        env = DomainEnvironment("shop.py:Shop", pool)
        task = Task("s1", [], env_args=json.loads(json.dumps(instance.to_json())))
        env.reset(task)
        assert env.call("sell", {"item": "pen"}) == "sold" and env.respond("It is sold. All done.") is None
        assert env.reward(task, ended())["success"] == 1.0
        env.reset(task)
        env.call("sell", {"item": "cup"})
        assert env.respond("It is sold. All done.") is None and env.reward(task, ended())["success"] == 0.0
        from pact_fast.envs.domain.base import make_domain

        assert check_instance(make_domain("shop.py:Shop"), instance, sandbox=pool) == []
    with pytest.raises(DataError, match="functions=true"):
        DomainEnvironment("shop.py:Shop").reset(task)


def test_a_domain_that_lacks_something_is_one_line():
    class Nothing(Domain):
        name = "nothing"

    with pytest.raises(PactError, match="needs name, policy, base and agent_tools"):
        Nothing()
