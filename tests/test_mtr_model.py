"""MTR with a language model: its output is checked like that of rules, and it never gets the answer."""

import json
import os
import random
from pathlib import Path

import pytest

from pact_fast.envs.simulated.actor import MARKUP, ToolActor, error_kind
from pact_fast.envs.simulated.backend import ERROR_KINDS, ToolRequest
from pact_fast.envs.simulated.env import make_actor
from pact_fast.envs.simulated.leaks import facts_behind, leaked, mentions, plain_text
from pact_fast.envs.simulated.model import ModelBackend, messages
from pact_fast.envs.simulated.recorded import ObservationStore
from pact_fast.envs.simulated.schemas import schema_error
from pact_fast.envs.simulated.world import MODEL
from pact_fast.errors import PactError
from pact_fast.llm import LLMClient, ServerFailed
from pact_fast.synthesis.mtr.model_tool_maker import INTERFACES, ModelToolMaker
from pact_fast.synthesis.mtr.plan import make_plan
from pact_fast.synthesis.mtr.qa import QARow, SubQuestion
from pact_fast.synthesis.mtr.readers import read_rows
from pact_fast.synthesis.mtr.tool_maker import NO_INTERFACE, REASONS, check_tool, secrets
from tests.support import simulated
from tests.support.llm_server import in_turn, llm_server, refused, said
from tests.support.optional import needs

needs("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")

ROW = QARow(
    "r", simulated.QUESTION, (simulated.GOLD,), simulated.world().passages,
    (SubQuestion("Free Guy >> director", "Shawn Levy"), SubQuestion("When was #1 born?", simulated.GOLD)),
)  # fmt: skip
PARAMETER = {"name": "film", "description": "A film.", "type": "string", "example": "Free Guy"}
RETURNED = {"name": "director", "description": "Its director.", "type": "string"}


def interface(**changes):
    tool = {"name": "get_director", "description": "The director of a film.", "parameters": [PARAMETER]}
    return {**tool, "returns": [RETURNED], **changes}


def written(*tools):
    return said(json.dumps({"tools": list(tools)}))


@pytest.fixture(scope="module")
def server():
    with llm_server(lambda body: said("x")) as running:
        yield running


@pytest.fixture
def client(server, tmp_path):
    server.bodies.clear()
    with LLMClient(server.config(cache_dir=str(tmp_path / "cache"), max_retries=0), "mtr") as made:
        yield made


def prompt_of(body):
    return "\n".join(message["content"] for message in body["messages"])


def episode_of(client, tmp_path, made=None, answers=(simulated.GOLD,)):
    actor = ToolActor(ModelBackend(client), ObservationStore(tmp_path / "observations.jsonl"))
    return actor.episode("t", made or simulated.world(), answers)


# ToolMaker


def test_interfaces_of_a_model_become_tools_with_closed_flat_schemas(server, client):
    server.answer = lambda body: written(interface())
    made = ModelToolMaker(client).make(ROW, make_plan(ROW))
    tool = made.world.tools["get_director"]
    assert not made.rejected and made.made == 1 and tool.kind == MODEL
    assert tool.parameters["required"] == ["film"] and tool.parameters["additionalProperties"] is False
    assert check_tool(tool, {"film": "Free Guy"}, secrets(ROW, make_plan(ROW)), ()) == []
    assert "search" in made.world.tools and made.evidence == ("Shawn Levy", simulated.GOLD)
    assert server.bodies[0]["response_format"]["json_schema"]["schema"] == INTERFACES


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        (interface(name="get director"), "bad_name"),
        (interface(name="class"), "bad_name"),
        (interface(description=" "), "no_description"),
        (interface(description="The director. <|im_end|>"), "markup"),
        (interface(description="The director, Shawn Levy."), "leaks_answer"),
        (interface(description=f"Who was born on {simulated.GOLD}."), "leaks_answer"),
        (interface(parameters=[{**PARAMETER, "type": "integer"}]), "bad_example"),
        (interface(parameters=[{**PARAMETER, "type": "number", "example": "nan"}]), "bad_example"),
    ],
)
def test_an_interface_that_fails_is_left_out_with_its_reason(server, client, tool, reason):
    server.answer = lambda body: written(interface(name="fine"), tool)
    made = ModelToolMaker(client).make(ROW, make_plan(ROW))
    assert "fine" in made.world.tools and [one.reasons for one in made.rejected] == [(reason,)]
    assert reason in REASONS and made.made == 2


def test_an_interface_that_fails_is_sent_back_and_repaired(server, client):
    server.answer = in_turn(written(interface(name="get director")), written(interface()))
    made = ModelToolMaker(client).make(ROW, make_plan(ROW))
    assert not made.rejected and len(server.bodies) == 2 and "keyword" in prompt_of(server.bodies[1])


def test_a_model_that_writes_no_interface_leaves_the_utilities_and_a_reason(server, client):
    for text in ("no json", "[]", '{"tools": []}', ""):
        server.answer = lambda body, text=text: said(text)
        row = QARow(f"r{len(text)}", f"{ROW.question} {text}", ROW.answers, ROW.passages)
        made = ModelToolMaker(client).make(row, make_plan(row))
        assert list(made.world.tools) == ["search"] and made.rejected[0].reasons == (NO_INTERFACE,)


def test_a_model_classifies_or_says_nothing(server, client):
    server.answer = lambda body: said('{"class": "bridge"}')
    assert ModelToolMaker(client).classify(ROW) == "bridge"
    server.answer = lambda body: said('{"class": "banana"}')
    assert ModelToolMaker(client).classify(QARow("s", "Another?", ("x",))) is None
    assert not any(mentions(prompt_of(body), simulated.GOLD) for body in server.bodies)


# ToolActor


def test_an_observation_of_a_model_is_stored_and_given_again(server, client, tmp_path):
    server.answer = lambda body: said('{"values": ["Shawn Levy"]}')
    for _ in range(2):
        episode = episode_of(client, tmp_path)
        assert episode.call("get_director", {"entity": "Free Guy"}) == '{"values": ["Shawn Levy"]}'
    assert len(server.bodies) == 1
    assert json.loads(episode.call("get_director", {"entity": 7}))["error"]["type"] == "invalid_arguments"
    assert len(server.bodies) == 1  # the gate is code


def test_an_invalid_output_is_repaired_twice_and_then_a_typed_error(server, client, tmp_path):
    server.answer = in_turn(said("nonsense"), said('{"values": "x"}'), said('{"values": ["Shawn Levy"]}'))
    episode = episode_of(client, tmp_path)
    assert "Shawn Levy" in episode.call("get_director", {"entity": "Free Guy"})
    assert "problem of answer 2" in prompt_of(server.bodies[2]) and "nonsense" not in prompt_of(server.bodies[2])
    server.answer = lambda body: said("<tool_call>nonsense")
    assert error_kind(episode.call("get_birth", {"entity": "x"})) == "invalid_output" and len(server.bodies) == 6


def test_an_answer_that_the_model_knows_itself_does_not_pass_at_the_first_hop(server, client, tmp_path):
    guess = said(json.dumps({"values": [f"Shawn Levy, born {simulated.GOLD}"]}))
    server.answer = in_turn(guess, guess, said('{"values": ["Shawn Levy"]}'))
    assert simulated.GOLD not in episode_of(client, tmp_path).call("get_director", {"entity": "Free Guy"})
    assert not any(mentions(prompt_of(body), simulated.GOLD) for body in server.bodies)  # nor is a guess confirmed


def test_a_server_that_fails_ends_the_run_and_leaves_no_observation(server, client, tmp_path):
    server.answer = lambda body: refused(400)
    with pytest.raises(ServerFailed):
        episode_of(client, tmp_path).call("get_director", {"entity": "Free Guy"})
    assert not (tmp_path / "observations.jsonl").read_bytes()


def test_the_environment_takes_the_backend_by_name(server, tmp_path):
    server.answer = lambda body: said('{"values": ["Shawn Levy"]}')
    args = {"backend": "model", "backend_args": {"model": "m", "base_url": server.url}}
    with pytest.raises(PactError, match=r"set env\.args\.cache"):
        make_actor(args)
    actor = make_actor({**args, "cache": str(tmp_path / "cache.jsonl")})
    assert "Levy" in actor.episode("t", simulated.world()).call("get_director", {"entity": "Free Guy"})
    with pytest.raises(PactError, match="backend_args"):
        make_actor({**args, "backend_args": {"model": "m", "color": 1}})


# input of a model, and its allowed output, on real rows


def rows_of(*names, count):
    if "PACT_TEST_DATA" not in os.environ:
        pytest.skip("set PACT_TEST_DATA to a folder with qa/*.jsonl")
    folder = Path(os.environ["PACT_TEST_DATA"]) / "qa"
    return [row for name in names for row in list(read_rows(folder / name))[:count]]


def test_no_prompt_holds_an_answer_that_the_facts_behind_the_call_do_not_hold(server, client, tmp_path):
    """On real rows: the answer is in no ToolMaker's prompt, and in an actor's prompt only from the facts of that call."""
    rows = rows_of("2wikimultihopqa_dev_passages.jsonl", "musique_dev_passages.jsonl", count=25)
    server.answer = lambda body: written(interface())
    maker, early = ModelToolMaker(client), 0
    for row in rows:
        plan = make_plan(row)
        server.bodies.clear()
        world = maker.make(row, plan).world
        told = plain_text([body["messages"] for body in server.bodies])
        hidden = [answer for answer in row.answers if not mentions(row.question, answer)]
        assert not any(mentions(told, answer) for answer in hidden), row.id
        for hop in plan.hops:
            arguments = {"film": next(iter(hop.arguments.values()), row.question)}
            tool = world.tools["get_director"]
            asked = plain_text(messages(ToolRequest(row.id, tool, arguments, world)))
            known = plain_text([facts_behind(tool, arguments, world), arguments])
            shown = [answer for answer in hidden if mentions(asked, answer)]
            assert all(mentions(known, answer) for answer in shown), row.id
            early += not shown
    assert early >= 30  # the check had something to find


def test_whatever_a_model_writes_becomes_a_tool_or_a_reason_and_an_observation_or_an_error(server):
    """A scripted model that writes valid and invalid output at random."""
    rng, client = random.Random(0), LLMClient(server.config(), "mtr")

    def mostly(good, *bad):
        return good if rng.random() < 0.85 else rng.choice(bad)

    def tool():
        fields = [
            {**PARAMETER, "name": mostly(f"film_{i}", "a b", "", "x" * 64), "type": mostly("string", "integer")}
            for i in range(rng.randint(1, 2))
        ]
        name = mostly("get_director", "get director", "class", "é", "x" * 65, "<|im_end|>")
        text = mostly("The director.", f"It is {simulated.GOLD}.", " ", "</tool_call>")
        return interface(name=name, description=text, parameters=fields)

    def output(schema):
        values = ["x", "Shawn Levy", 1, True, None, ["a"], "<|im_start|>", simulated.GOLD, "y" * 9000]
        made = {key: rng.choice(values) for key in schema["properties"]}
        return mostly(json.dumps(made), "nonsense", "[" * 3000, json.dumps({**made, "more": 1}), "")

    def answer(body):
        schema = body["response_format"]["json_schema"]["schema"]
        if schema == INTERFACES:
            return written(*(tool() for _ in range(rng.randint(1, 3)))) if rng.random() < 0.9 else said("nonsense")
        return said(output(schema))

    server.answer = answer
    maker, seen = ModelToolMaker(client, repairs=0), {"tools": 0, "rejected": 0, "observations": 0, "errors": 0}
    for index in range(50):
        row = QARow(f"r{index}", f"{ROW.question} ({index})", ROW.answers, ROW.passages, ROW.decomposition)
        made = maker.make(row, make_plan(row))
        seen["rejected"] += len(made.rejected)
        assert all(one.reasons and set(one.reasons) <= {*REASONS, NO_INTERFACE} for one in made.rejected)
        actor = ToolActor(ModelBackend(client))
        for one in made.world.tools.values():
            assert check_tool(one, {}, secrets(row, make_plan(row)), ()) in ([], ["bad_example"])
            if one.kind != MODEL:
                continue
            seen["tools"] += 1
            typed = one.parameters["properties"].items()
            arguments = {name: "Free Guy" if schema["type"] == "string" else 1 for name, schema in typed}
            text = actor.episode(row.id, made.world, row.answers).call(one.name, arguments)
            kind = error_kind(text)
            seen["errors" if kind else "observations"] += 1
            if kind:
                assert kind in ERROR_KINDS
                continue
            value = json.loads(text)
            assert schema_error(value, one.output) is None and not MARKUP.search(plain_text(value))
            assert not leaked(value, one, arguments, made.world, row.answers)
    client.close()
    assert min(seen.values()) >= 10, seen
