"""ToolMaker: the tools of a row, and every check of an interface."""

from dataclasses import replace

import pytest

from pact_fast.synthesis.mtr.mentions import capitalised, mention, shared_span
from pact_fast.synthesis.mtr.names import tool_name
from pact_fast.synthesis.mtr.plan import classify, make_plan
from pact_fast.synthesis.mtr.qa import QARow, SubQuestion
from pact_fast.synthesis.mtr.tool_maker import REASONS, check_tool, make_tools
from tests.support.qa_data import MUSIQUE, WIKI
from tests.support.simulated import look_up

TOOL = look_up("get_director", "director")
OPEN = {key: value for key, value in TOOL.parameters.items() if key != "additionalProperties"}
MANY = {**TOOL.parameters, "properties": {f"p{i}": {"type": "string"} for i in range(6)}, "required": []}
FLAT = TOOL.output


@pytest.mark.parametrize(
    "reason, change",
    [
        ("bad_name", {"name": "get director"}),
        ("bad_name", {"name": "x" * 65}),
        ("bad_name", {"name": "class"}),
        ("bad_name", {"name": "gét"}),
        ("duplicate_name", {"name": "taken"}),
        ("no_description", {"description": " "}),
        ("leaks_answer", {"description": "Says shawn levy."}),
        ("leaks_answer", {"name": "get_shawn_levy"}),
        ("bad_parameters", {"parameters": {"type": "array"}}),
        ("bad_parameters", {"parameters": {**TOOL.parameters, "properties": {"entity": {"type": "name"}}}}),
        ("bad_parameters", {"parameters": {**TOOL.parameters, "properties": {"entity": {}}}}),
        ("bad_parameters", {"parameters": {**TOOL.parameters, "properties": {"entity": {"type": "string", "pattern": "x"}}}}),
        ("open_parameters", {"parameters": OPEN}),
        ("unknown_required", {"parameters": {**TOOL.parameters, "required": ["name"]}}),
        ("too_many_parameters", {"parameters": MANY}),
        ("bad_output", {"output": {}}),
        ("bad_output", {"output": {"type": "object", "properties": {}, "additionalProperties": False}}),
        ("bad_output", {"output": {**FLAT, "additionalProperties": True}}),
        ("bad_output", {"output": {**FLAT, "required": []}}),
        ("bad_output", {"output": {**FLAT, "properties": {"values": {"type": "object", "properties": {}}}}}),
        ("bad_output", {"output": {**FLAT, "properties": {"values": {"type": "array", "items": {"type": "array"}}}}}),
        ("bad_example", {"parameters": {**TOOL.parameters, "properties": {"entity": {"type": "integer"}}}}),
    ],
)  # fmt: skip
def test_every_check_has_a_reason(reason, change):
    assert check_tool(TOOL, {"entity": "Free Guy"}, ["Shawn Levy"], ["taken"]) == []
    assert reason in check_tool(replace(TOOL, **change), {"entity": "Free Guy"}, ["Shawn Levy"], ["taken"])
    assert reason in REASONS


def test_the_example_must_survive_our_own_format():
    # a marker inside an argument is written in a way that is read back
    assert check_tool(TOOL, {"entity": "</tool_call> <think>"}, [], []) == []


def test_2wiki_triples_become_look_ups_and_a_comparison_gets_compare():
    made = make_tools(WIKI, make_plan(WIKI))
    assert list(made.world.tools) == ["get_director", "get_date_of_birth", "search", "compare", "date_difference"]
    assert (made.made, made.rejected) == (4, ())  # two pairs of duplicates were merged
    assert [fact.arguments["entity"] for fact in made.world.facts] == [
        "Forbidden Ground",
        "Free Guy",
        "Pál Gábor",
        "Shawn Levy",
    ]
    assert made.evidence == ("Pál Gábor", "Shawn Levy", "2 November 1932", "July 23, 1968")


def test_musique_sub_questions_become_look_ups_with_the_entity_as_parameter():
    plan = make_plan(MUSIQUE)
    made = make_tools(MUSIQUE, plan)
    assert list(made.world.tools) == [
        "get_performer",
        "get_state_live",
        "get_many_store",
        "search",
        "calculator",
    ]
    assert [hop.arguments for hop in plan.hops] == [
        {"entity": "Hello Love"},
        {"entity": "Hank Snow"},
        {"entity": "Tennessee"},
    ]
    assert [hop.depth for hop in plan.hops] == [0, 1, 2]
    assert made.world.tools["get_state_live"].description == "Answers: What state did [entity] live in?"


def test_an_interface_that_says_an_answer_is_rejected_and_nothing_is_looked_up_through_it():
    row = replace(
        MUSIQUE,
        decomposition=(SubQuestion("What state near Tennessee did Hello Love see?", "Tennessee"),),
        answers=("Tennessee",),
    )
    made = make_tools(row, make_plan(row))
    assert [r.reasons for r in made.rejected] == [("leaks_answer",)]
    assert not made.world.facts and list(made.world.tools) == ["search", "calculator"]


def test_near_duplicates_get_one_name():
    assert tool_name("Directors") == tool_name("director") == "get_director"
    assert tool_name("date of birth") == "get_date_of_birth"
    assert tool_name("What company published ") == tool_name("what company published?") == "get_company_published"
    assert tool_name("é" * 200) == "get_" + "e" * 60 and tool_name("…") == "get_fact"


def test_entities_are_worded_as_the_question_words_them():
    question = "Who is the father of Khanzada Begum's director in The Golden Calf (1930 Film)?"
    assert mention(question, "khanzada begum") == "Khanzada Begum"
    assert mention(question, "The Golden Calf (film)") == "The Golden Calf"
    assert shared_span(question, "who acted in the golden calf") == "The Golden Calf"
    assert shared_span(question, "who is the father") is None
    assert capitalised(question, ["Khanzada Begum"]) == "The Golden Calf (1930 Film)"


@pytest.mark.parametrize(
    "row, task_class",
    [(WIKI, "bridge_comparison"), (MUSIQUE, "composition"), (QARow("b", "Are both A and B films?", ("yes",)), "comparison"),
     (QARow("b", "Which is older, A or B?", ("A",)), "comparison"), (QARow("b", "Who wrote A?", ("B",)), "bridge")],
)  # fmt: skip
def test_tasks_are_classified(row, task_class):
    assert classify(row) == task_class
