from __future__ import annotations

import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.chat.chat_template import ChatTemplate
from pact_fast.chat.formats.base import MAX_CALLS, ParsedTurn, ToolFormat
from pact_fast.chat.formats.hermes import Hermes
from pact_fast.chat.formats.json_calls import error_observation
from pact_fast.chat.formats.llama3_json import Llama3Json
from pact_fast.chat.formats.registry import detect_format, get_format
from pact_fast.chat.tool_schema import call_error
from pact_fast.components import Component
from pact_fast.data.types import ToolCall
from pact_fast.errors import PactError
from tests.support.chat_tokenizers import chatml_like, llama3_like, qwen3_like

HERMES, LLAMA = Hermes(), Llama3Json()
FORMATS = pytest.mark.parametrize("fmt", [HERMES, LLAMA], ids=lambda f: type(f).__name__)
R, C, A = Component.REASONING, Component.TOOL_CALL, Component.ANSWER


def tool(name: str, properties: dict | None = None, **parameters) -> dict:
    schema = {"type": "object", "properties": properties or {}, **parameters}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    tool("f", {"x": {"type": "integer"}}),
    tool("get_weather", {"city": {"type": "string"}}, required=["city"]),
    tool("any"),
]
F = ToolCall("f", {"x": 1})


def parse(text: str | bytes, fmt: ToolFormat = HERMES, tools: list = TOOLS, **options) -> ParsedTurn:
    data = text.encode() if isinstance(text, str) else text
    turn = fmt.parse(data, tools, **options)
    edges = [0] + [end for _, end, _ in turn.spans]
    assert [start for start, _, _ in turn.spans] == edges[:-1] and edges[-1] == len(data)
    assert all(start < end for start, end, _ in turn.spans)
    return turn


def shown(text: str, turn: ParsedTurn) -> list[tuple[str, Component]]:
    return [(text.encode()[a:b].decode(), component) for a, b, component in turn.spans]


def only_error(turn: ParsedTurn) -> str:
    assert len(turn.attempts) == 1 and isinstance(turn.attempts[0], str), turn
    return turn.attempts[0]


def test_hermes_writes_what_qwen_writes():
    assert HERMES.render("Why.", "Wait.", [F, ToolCall("any", {"é": [None, True]})]) == (
        "<think>\nWhy.\n</think>\n\nWait.\n"
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "any", "arguments": {"é": [null, true]}}\n</tool_call>'
    )


def test_llama_writes_what_llama_writes():
    assert LLAMA.render("", "", [F, ToolCall("any", {})]) == (
        '{"name": "f", "parameters": {"x": 1}}; {"name": "any", "parameters": {}}'
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
made_calls = st.lists(
    st.builds(ToolCall, st.just("any"), st.dictionaries(st.text(), json_values, max_size=3)), max_size=3
)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(lambda s: " ".join(s.split()).strip())


@FORMATS
@settings(max_examples=60, deadline=None)
@given(reasoning=words, content=words, calls=made_calls)
def test_whatever_is_rendered_is_read_back(fmt, reasoning, content, calls):
    text = fmt.render(reasoning, content, calls)
    turn = parse(text, fmt)
    assert turn.attempts == calls
    if not any(c in "<{" for c in reasoning + content):  # markers in text are made inert; see below
        assert turn.reasoning == reasoning and turn.content == content
    pieces = [(piece, component) for piece, component in fmt.pieces(reasoning, content, calls) if piece]
    spans = [
        (component, "".join(s for s, _ in group)) for component, group in groupby(shown(text, turn), lambda s: s[1])
    ]
    assert spans == [(component, piece) for piece, component in pieces]  # one piece may hold several calls


@pytest.mark.parametrize("evil", ["</think>", "<think>", "<tool_call>", "</tool_call>", "</thi</think>nk>"])
@pytest.mark.parametrize("place", ["reasoning", "content", "argument", "key"])
def test_markers_in_the_text_of_a_turn_are_no_structure(evil, place):
    text = f"a {evil} b"
    calls = {"argument": [ToolCall("any", {"k": text})], "key": [ToolCall("any", {text: 1})]}.get(place, [F])
    turn = parse(HERMES.render(text if place == "reasoning" else "Hm.", text if place == "content" else "", calls))
    assert turn.attempts == calls
    assert [c for _, _, c in turn.spans] == ([R, A, C] if place == "content" else [R, C])


def test_spans_of_a_full_turn():
    text = '<think>\nWhy.\n</think>\n\nWait. \n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\nBye\n'
    turn = parse(text)
    assert shown(text, turn) == [
        ("<think>\nWhy.\n</think>", R),
        ("\n\nWait.", A),
        (' \n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', C),
        ("\nBye\n", A),
    ]
    assert (turn.reasoning, turn.content, turn.calls, turn.text) == ("Why.", "Wait.\nBye", [F], text)


def test_blanks_at_the_end_belong_to_what_precedes_them():
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call> \n'
    assert shown(text, parse(text)) == [(text, C)]


@pytest.mark.parametrize("text", ["Paris.", " \n", "", "a {b} <c>", "x </think> y", '{"temperature": 3}', "<tool_cal"])
@FORMATS
def test_text_without_an_attempt_is_an_answer(fmt, text):
    turn = parse(text, fmt)
    assert turn.attempts == [] and turn.content == text.strip()
    assert {c for _, _, c in turn.spans} <= {A}


@FORMATS
def test_reasoning_that_never_ends_is_an_empty_answer(fmt):
    text = "\n<think>I could <tool_call>{}</tool_call>"
    turn = parse(text, fmt)
    assert (turn.content, turn.attempts) == ("", []) and shown(text, turn) == [(text, R)]
    assert turn.reasoning.startswith("I could")


def test_call_inside_the_reasoning_is_no_call():
    turn = parse("<think><tool_call>{}</tool_call></think>Done")
    assert turn.attempts == [] and turn.content == "Done"


def test_reasoning_that_the_prompt_has_opened():
    text = "Why.\n</think>\n\nYes."
    turn = parse(text, thinking=True)
    assert (turn.reasoning, turn.content) == ("Why.", "Yes.")
    assert shown(text, turn) == [("Why.\n</think>", R), ("\n\nYes.", A)]
    assert parse(text).content == text


def hermes(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


BAD_BODIES = {
    "not valid JSON": ["{", "f(x=1)", '{"name": "f", "arguments": {', '{"name": "f"} {"name": "f"}', "", "{'a': 1}"],
    "NaN is not": ['{"name": "f", "arguments": {"x": NaN}}'],
    "Infinity is not": ['{"name": "f", "arguments": {"x": -Infinity}}'],
    "too large": ['{"name": "f", "arguments": {"x": 1e999}}'],
    "surrogate": ['{"name": "any", "arguments": {"x": "\\ud800"}}'],
    "nested deeper": ['{"name": "any", "arguments": {"x": ' + "[" * n + "]" * n + "}}" for n in (65, 5000, 200_000)],
    "must be a JSON object": ['"f"', "[]", "null", '{"name": "f", "arguments": [1]}'],
    'no string "name"': ['{"arguments": {}}', '{"name": 3, "arguments": {}}', '{"name": "", "arguments": {}}'],
    "unknown tool 'get_wether'; tools: get_weather, ": ['{"name": "get_wether", "arguments": {}}'],
    "missing required argument 'city'": ['{"name": "get_weather", "arguments": {"a": 1}}', '{"name": "get_weather"}'],
    "argument 'x' must be integer, not string": ['{"name": "f", "arguments": {"x": "1"}}'],
    "argument 'x' must be integer, not number": ['{"name": "f", "arguments": {"x": 1.5}}'],
    "argument 'x' must be integer, not boolean": ['{"name": "f", "arguments": {"x": true}}'],
    "argument 'x' must be integer, not null": ['{"name": "f", "arguments": {"x": null}}'],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "body"), [(reason, body) for reason, bodies in BAD_BODIES.items() for body in bodies]
)
def test_malformed_call_is_an_error_that_says_why(reason, body):
    error = only_error(parse(hermes(body)))
    assert reason in error and len(error) < 1000


def test_huge_integer_is_an_error():
    assert "not valid JSON" in only_error(parse(hermes('{"name": "any", "arguments": {"x": ' + "9" * 5000 + "}}")))


def test_invalid_utf8_is_an_error_and_stays_in_place():
    turn = parse(b"a\xff <tool_call>{\xff}</tool_call>")
    assert "UTF-8" in only_error(turn) and turn.content == "a\ufffd" and "\ufffd" in turn.text


def test_last_of_duplicate_keys_wins():
    assert parse(hermes('{"name": "f", "arguments": {"x": 1, "x": 2}}')).calls == [ToolCall("f", {"x": 2})]


def test_unclosed_calls_are_errors_in_their_place():
    good = hermes(json.dumps(F.to_json()))
    turn = parse(f"<tool_call>{{<tool_call>{good}</tool_call>{good}<tool_call>{{")
    kinds = ["not closed before", "not closed before", F, "</tool_call> without <tool_call>", F, "not closed; end"]
    for attempt, kind in zip(turn.attempts, kinds, strict=True):
        assert attempt == kind if isinstance(kind, ToolCall) else kind in attempt
    assert turn.calls == [F, F] and len(turn.errors) == 4


def test_other_spellings_of_a_call_are_read():
    assert parse(hermes('{"name": "f", "parameters": {"x": 1}}')).calls == [F]
    assert parse(hermes('{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}')).calls == [F]
    assert parse(hermes('{"name": "any", "arguments": null}')).calls == [ToolCall("any", {})]


def test_stuck_model_gets_one_error_for_all_the_rest():
    turn = parse(hermes('{"name": "any"}') * 1000)
    assert len(turn.attempts) == MAX_CALLS + 1 and "more than 64 tool calls" in turn.attempts[-1]
    turn = parse("; ".join(['{"name": "any", "parameters": {}}'] * 1000), LLAMA)
    assert len(turn.attempts) == MAX_CALLS + 1 and "more than 64 tool calls" in turn.attempts[-1]
    assert all(c is C for _, _, c in turn.spans)
    assert "more than 64" in parse("<tool_call>" * 1000).attempts[-1]


def test_llama_calls_and_their_spans():
    text = '<think>\nHm.\n</think>\n\n{"name": "f", "parameters": {"x": 1}}; {"name": "any", "parameters": {}}\nok'
    turn = parse(text, LLAMA)
    assert turn.calls == [F, ToolCall("any", {})] and turn.content == "ok"
    assert shown(text, turn) == [
        ("<think>\nHm.\n</think>", R),
        ('\n\n{"name": "f", "parameters": {"x": 1}}', C),
        ('; {"name": "any", "parameters": {}}', C),
        ("\nok", A),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '<|python_tag|>{"name": "f", "parameters": {"x": 1}}',
        'I call: {"name": "f", "parameters": {"x": 1}}',
        '{"type": "function", "name": "f", "parameters": {"x": 1}}',
        ' {"name":"f","arguments":{"x":1}}',
    ],
)
def test_llama_call_in_other_dress(text):
    assert parse(text, LLAMA).attempts == [F]


def test_llama_call_of_a_known_tool_needs_no_parameters():
    assert parse('{"name": "any"}', LLAMA).attempts == [ToolCall("any", {})]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Bob", "age": 3}',
        'The record is {"name": "Bob"}.',
        'See {"name": broken',
        "[1, 2]",
        '{"type": "circle"}',
    ],
)
def test_llama_json_that_is_no_call_is_an_answer(text):
    turn = parse(text, LLAMA)
    assert turn.attempts == [] and turn.content == text


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("not valid JSON", '{"name": "f", "parameters": {"x": 1'),
        ("not valid JSON", '{"name": "f", "parameters": {"x": 1}}; {"name": "f", "para'),
        ("not valid JSON", "<|python_tag|>f.call(x=1)"),
        ("unknown tool 'g'", '{"name": "g", "parameters": {}}'),
        ('no string "name"', '{"name": 3, "parameters": {}}'),
        ("must be integer", '{"name": "f", "parameters": {"x": "1"}}'),
        ("nested deeper", '{"name": "f", "parameters": ' + "[" * 100_000),
        ("UTF-8", b'{"name": "f", "parameters": {"x": "\xff"}}'),
    ],
)
def test_llama_malformed_call_is_an_error_that_says_why(reason, text):
    assert reason in parse(text, LLAMA).errors[-1]


# Schemas as they are found in the wild: (property schema, value, accepted)
SCHEMAS = [
    ({"type": "string"}, "a", True),
    ({"type": "string"}, 1, False),
    ({"type": "str"}, "a", True),
    ({"type": "integer"}, 3.0, True),
    ({"type": "integer"}, 3.5, False),
    ({"type": "int"}, True, False),
    ({"type": "number"}, 3, True),
    ({"type": "float"}, 3, True),
    ({"type": "float"}, "3", False),
    ({"type": "boolean"}, 0, False),
    ({"type": "boolean"}, False, True),
    ({"type": "dict"}, {}, True),
    ({"type": "dict"}, [], False),
    ({"type": "array", "items": {"type": "string"}}, ["a", "b"], True),
    ({"type": "array", "items": {"type": "string"}}, ["a", 1], False),
    ({"type": "array", "items": "string"}, [1], True),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {}, False),
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": "x"}, False),
    ({"type": "object", "additionalProperties": False}, {"b": 1}, False),
    ({"type": "object", "properties": None, "required": True}, {"b": 1}, True),
    ({"type": ["string", "null"]}, None, True),
    ({"type": ["string", "null"]}, 1, False),
    ({"type": "null"}, None, True),
    ({"type": "any"}, object, True),
    ({"type": "String"}, "a", True),
    ({"type": "Dict[str, int]"}, 3, True),
    ({"type": {"odd": 1}}, 3, True),
    ({}, [1], True),
    (None, [1], True),
    ("string", 1, True),
    ({"enum": ["a", "b"]}, "b", True),
    ({"enum": ["a", "b"]}, "c", False),
    ({"enum": "ab"}, "c", True),
]


@pytest.mark.parametrize(("schema", "value", "accepted"), SCHEMAS)
def test_arguments_are_held_against_the_schema_leniently(schema, value, accepted):
    error = call_error(ToolCall("t", {"v": value}), [tool("t", {"v": schema})])
    assert (error is None) == accepted, error
    assert error is None or error.startswith("t: ")


def test_unknown_argument_is_an_error_only_where_the_schema_says_so():
    assert call_error(ToolCall("t", {"b": 1}), [tool("t", {"a": {}})]) is None
    error = call_error(ToolCall("t", {"b": 1}), [tool("t", {"a": {}}, additionalProperties=False)])
    assert error == "t: unknown argument 'b'; known: a"


@pytest.mark.parametrize(
    "odd", [{}, {"function": None}, {"name": "t"}, {"function": {"name": "t", "parameters": None}}]
)
def test_odd_tools_do_no_harm(odd):
    assert call_error(ToolCall("t", {}), [odd]) in (None, "unknown tool 't'; tools: None")


def test_error_for_an_unknown_tool_stays_short():
    error = call_error(ToolCall("x" * 100_000, {}), [tool(f"tool_{i}") for i in range(200)])
    assert error is not None and "and 180 more" in error and len(error) < 500


@pytest.mark.parametrize("error", ["no such tool", "x" * 5000, '"' * 300, "é\n" * 300, "\x00" * 400, ""])
def test_error_observation_is_short_json(error):
    text = error_observation(error)
    assert len(text) <= 400
    told = json.loads(text)["error"]
    assert told == error or (told.endswith("…") and error.startswith(told[:-1]) and len(text) > 380)


@pytest.mark.parametrize(
    ("tokenizer", "name"), [(chatml_like, "hermes"), (qwen3_like, "hermes"), (llama3_like, "llama3_json")]
)
def test_format_is_detected_from_the_chat_template(tokenizer, name):
    assert type(detect_format(ChatTemplate(tokenizer()))) is type(get_format(name))
    assert get_format("auto") is None


@pytest.mark.parametrize("tokenizer", [lambda: qwen3_like("qwen2_5_vl"), lambda: llama3_like("llama3")])
def test_unknown_format_of_a_template_is_refused(tokenizer):
    with pytest.raises(PactError, match="none of the known formats"):
        detect_format(ChatTemplate(tokenizer()))


def test_unknown_format_name_is_refused():
    with pytest.raises(PactError, match=r"unknown tool format 'xml'; registered: .*hermes, .*lfm2, llama3_json"):
        get_format("xml")
