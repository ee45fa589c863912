"""Every role by a model behind an endpoint: its output is data, and the controls confirm every accepted task."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import jsonschema
import pytest

from pact_fast.cli.main import main
from pact_fast.envs.domain.controls import Finding, check_instance
from pact_fast.errors import PactError
from pact_fast.llm import LLMClient
from pact_fast.synthesis.eigendata.actor import act_schema
from pact_fast.synthesis.eigendata.compose import RulesSynthesizer
from pact_fast.synthesis.eigendata.engine import DataEngine, Settings
from pact_fast.synthesis.eigendata.make_roles import ROLES, make_roles
from pact_fast.synthesis.eigendata.roles import Rollout, TaskPlan
from pact_fast.synthesis.eigendata.rollout import ScriptedPlayer, gold_acts
from tests.support import eigendata as support
from tests.support.llm_server import llm_server, said
from tests.support.optional import needs

needs("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")
needs("jsonschema", reason="jsonschema is not installed: pip install 'pact-fast[llm]'")

DOMAIN = support.helpdesk()
PLAN = TaskPlan(0, ("abroad",))


def composed(seed=0):
    return RulesSynthesizer().synthesize(DOMAIN, PLAN, DOMAIN.subjects()[3], support.VERSION, random.Random(seed))


def answering(answer, *names):
    """Roles by a model that says `answer(body)`, in a context."""
    server = llm_server(lambda body: said(json.dumps(answer(body))))
    return _Roles(server, names)


class _Roles:
    def __init__(self, server, names):
        self._server, self._names = server, names

    def __enter__(self):
        server = self._server.__enter__()
        self._client = LLMClient(server.config(), "tester")
        return make_roles(self._names, self._client), server

    def __exit__(self, *error):
        self._client.close()
        return self._server.__exit__(*error)


def test_plans_of_a_model_overlap_none_and_unusable_ones_are_the_rules():
    asked = []

    def answer(body):
        asked.append(body["messages"][-1]["content"])
        return {"issues": ["abroad"], "style": "worried"}  # every time

    with answering(answer, "planner") as (roles, server):
        plans = []
        for number in range(3):
            plans.append(roles.planner.plan(DOMAIN, plans, support.VERSION, random.Random(number)))
    assert plans[0].issues == ("abroad",) and plans[0].style == "worried"
    assert len({frozenset(plan.issues) for plan in plans}) == 3
    assert any("another plan has these issues" in text for text in asked)
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert set(schema["properties"]["issues"]["items"]["enum"]) == {issue.name for issue in DOMAIN.issues}


@pytest.mark.parametrize("forgets", [False, True])
def test_a_solution_that_a_model_finds_with_the_tools_is_gold_if_the_controls_confirm_it(forgets):
    """It tries calls one after the other and sees their results; errors are not part of the solution."""
    gold = [step for step in composed().gold if not (forgets and step.by == "user")]
    acts = [{"act": "call", "tool": "get_account", "arguments": {"account_id": "A0"}}]  # fails
    acts += [{"act": "call", "tool": step.name, "arguments": dict(step.arguments)} for step in gold]
    seen = []

    def answer(body):
        turns = sum(message["role"] == "assistant" for message in body["messages"])
        seen.append(body["messages"][-1]["content"])
        return acts[turns] if turns < len(acts) else {"act": "end"}

    with answering(answer, "synthesizer") as (roles, _):
        made = roles.synthesizer.synthesize(DOMAIN, PLAN, DOMAIN.subjects()[3], support.VERSION, random.Random(0))
    assert seen[1] == "error: there is no account A0" and any("account_id" in text for text in seen[2:])
    assert [step.name for step in made.gold] == [step.name for step in gold]
    assert made.versions["solving.md"].startswith("solving.md@1:")
    found = check_instance(DOMAIN, made)
    assert (found == []) is not forgets
    if forgets:
        assert found[0].control == "gold_passes" and found[0].blame == "task"


def test_a_verifier_can_object_to_a_sound_task_and_save_no_other():
    with answering(lambda body: {"sound": False, "blame": "user", "reason": "rude"}, "verifier") as (roles, _):
        verdict = roles.task_verifier.verify(DOMAIN, PLAN, composed(), support.VERSION)
    assert verdict == [Finding("judged", "user", "rude")]
    broken = replace(composed(), gold=())
    with answering(lambda body: {"sound": True, "blame": "task", "reason": "fine"}, "verifier") as (roles, server):
        assert roles.task_verifier.verify(DOMAIN, PLAN, composed(), support.VERSION) == []
        before = len(server.bodies)
        assert roles.task_verifier.verify(DOMAIN, PLAN, broken, support.VERSION)[0].control == "gold_passes"
        assert len(server.bodies) == before  # nobody is asked about a task that fails its controls


def test_blame_is_asked_for_where_the_dialogue_shows_none():
    instance = composed()
    failed = Rollout([{"role": "system", "content": ""}, {"role": "user", "content": "hi"}], False, "state: x")
    with answering(lambda body: {"blame": "checker", "reason": "too strict"}, "verifier") as (roles, server):
        judged = roles.trajectory_verifier.assess(DOMAIN, instance, [failed], support.VERSION)
        assert judged.score == 0.0 and judged.findings[0] == Finding("judged", "checker", "too strict")
        gave_up = replace(failed, gave_up=True)
        assert (
            roles.trajectory_verifier.assess(DOMAIN, instance, [gave_up], support.VERSION).findings[0].blame == "user"
        )
        good = replace(failed, passed=True)
        assert roles.trajectory_verifier.assess(DOMAIN, instance, [good], support.VERSION).score == 1.0
        assert len(server.bodies) == 1


def agent_of(instance):
    """A model that acts as the scripted agent does."""
    acts = [
        {"act": "say", "text": act} if isinstance(act, str)
        else {"act": "call", "tool": act.name, "arguments": dict(act.arguments)}
        for act in gold_acts(DOMAIN, instance)
    ]  # fmt: skip
    return lambda body: [*acts, {"act": "end"}][sum(m["role"] == "assistant" for m in body["messages"])]


def user_of(instance, leaves=False):
    """A model that answers and acts as it is asked, or leaves at once."""

    def answer(body):
        last = body["messages"][-1]["content"]
        if leaves or "All done" in last:
            return {"act": "end"}
        if "roaming" in last and "turn" in last:
            return {"act": "call", "tool": "set_phone_roaming", "arguments": {"on": True}}
        told = [f"My {name} is {value}." for name, value in instance.user.knows.items() if name in last]
        return {"act": "say", "text": " ".join(told) or "Done."}

    return answer


@pytest.mark.parametrize(("names", "leaves"), [(("agent",), False), (("agent", "user"), False), (("user",), True)])
def test_agent_and_user_by_a_model_play_the_dialogue_that_the_scripts_play(names, leaves):
    instance = composed()

    def answer(body):
        agent = "You are a customer" not in body["messages"][0]["content"]
        return (agent_of(instance) if agent else user_of(instance, leaves))(body)

    with answering(answer, *names) as (roles, server):
        rollout = roles.player.play(DOMAIN, instance, support.VERSION, random.Random(0))
    scripted = ScriptedPlayer().play(DOMAIN, instance, support.VERSION, random.Random(0))
    assert rollout.passed is not leaves
    if names == ("agent",):
        assert rollout.messages == scripted.messages
    if leaves:
        assert rollout.missed == ["set_phone_roaming"]
        found = roles.trajectory_verifier.assess(DOMAIN, instance, [rollout], support.VERSION).findings
        assert found[0].blame == "user"
    for body in server.bodies:  # the user sees no call of the agent, the agent none of the user's
        whole = json.dumps(body["messages"])
        user = "You are a customer" in whole
        assert ("find_account" in whole) is not user and ("set_phone_roaming" in whole) is user


def test_acts_are_bound_by_a_schema_of_the_tools_at_hand():
    schema = act_schema(DOMAIN.schemas)
    good = {"act": "call", "tool": "resume_line", "arguments": {"account_id": "A1"}}
    jsonschema.validate(good, schema)
    for bad in (
        {**good, "tool": "nothing"}, {**good, "arguments": {"account_id": 1}}, {**good, "more": 1}, {"act": "say"},
        {**good, "arguments": {"account_id": "A" * 500}},
    ):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    assert all(option["properties"]["act"] != {"const": "say"} for option in act_schema([], speaks=False)["anyOf"])


def random_value(schema, rng):
    """Something that fits a schema, without any sense."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "anyOf" in schema:
        return random_value(rng.choice(schema["anyOf"]), rng)
    kind = schema.get("type")
    if kind == "object":
        return {name: random_value(value, rng) for name, value in schema["properties"].items()}
    if kind == "array":
        count = rng.randint(schema.get("minItems", 0), min(schema.get("maxItems", 2), 3))
        return [random_value(schema["items"], rng) for _ in range(count)]
    if kind == "boolean":
        return rng.random() < 0.5
    if kind in ("integer", "number"):
        return rng.randint(0, 60)
    return rng.choice(("A1234", "never", "synthesis.yaml", "patience", "Please turn roaming on on your phone."))


@pytest.mark.slow
def test_whatever_a_model_writes_nothing_unverified_is_accepted(tmp_path):
    """All roles by a model that writes nonsense of the right shape, 20 tasks; its words alone would make sound ones."""
    rng = random.Random(0)

    def answer(body):
        if "response_format" in body:
            return json.dumps(random_value(body["response_format"]["json_schema"]["schema"], rng))
        wishes = re.search(r"sentence by sentence:\n(.*?)\n\nHow the customer", body["messages"][0]["content"], re.S)
        return wishes[1] if rng.random() < 0.5 else "I want take_payment."

    counts = {}
    for names in (ROLES, ("planner", "wording", "reflection")):
        out = tmp_path / str(len(names))
        with llm_server(lambda body: said(answer(body))) as server, LLMClient(server.config(), "tester") as client:
            settings = Settings("helpdesk", rounds=2, plans=4, count=20, models=names)
            engine = DataEngine(DOMAIN, out, settings, make_roles(names, client))
            candidates = engine.run()
            asked = {row["role"] for row in client.report()["usage"]}
        accepted = [candidate.instance for candidate in candidates if candidate.accepted]
        assert all(check_instance(DOMAIN, instance) == [] for instance in accepted)
        assert [problem for instance in accepted for problem in support.failing_controls(DOMAIN, instance)] == []
        counts[len(names)] = (len(accepted), asked)
    assert {"planner", "wording", "synthesizer", "reflection"} <= counts[len(ROLES)][1]
    assert counts[3][0] > 0  # and correct ones are accepted


def test_the_command_wants_both_the_roles_and_the_model(tmp_path, capsys):
    llm = tmp_path / "llm.yaml"
    llm.write_text("model: m\nbase_url: http://127.0.0.1:9/v1\n")
    out = ["data", "eigendata", "helpdesk", "-o", str(tmp_path / "out")]
    for extra, message in (
        (["--models", "planner"], "give both"),
        (["--llm", str(llm)], "give both"),
        (["--models", "planer", "--llm", str(llm)], "unknown role 'planer'"),
    ):
        assert main([*out, *extra]) != 0
        assert message in capsys.readouterr().err
    with pytest.raises(PactError, match="unknown role"):
        make_roles(["x"], None)
