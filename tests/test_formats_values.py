"""Formats that write arguments without JSON: all written values are read back, typed by the tool's schema."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.chat.formats.base import ToolFormat
from pact_fast.chat.formats.deepseek_v3 import DeepseekV3
from pact_fast.chat.formats.deepseek_v31 import CALL, SECTION, SEPARATOR, DeepseekV31
from pact_fast.chat.formats.gemma4 import Gemma4
from pact_fast.chat.formats.glm4_moe import Glm4Moe
from pact_fast.chat.formats.granite import Granite
from pact_fast.chat.formats.harmony import Harmony
from pact_fast.chat.formats.lfm2 import Lfm2
from pact_fast.chat.formats.minimax_m2 import MinimaxM2
from pact_fast.chat.formats.mistral import Mistral
from pact_fast.chat.formats.mistral_json import MistralJson
from pact_fast.chat.formats.python_calls import read_calls
from pact_fast.chat.formats.qwen3_coder import Qwen3Coder
from pact_fast.chat.formats.typed_values import read_value
from pact_fast.components import Component
from pact_fast.data.types import ToolCall

PYTHON_WORDS, RAW_STRINGS, NONE = Qwen3Coder(), Lfm2(), Gemma4()
PYTHON_WORDS._python_words, RAW_STRINGS._escaped, NONE._null = True, False, "None"
FORMATS = {
    "qwen3_coder": Qwen3Coder(), "qwen3_coder, Python's words": PYTHON_WORDS, "gemma4": Gemma4(), "gemma4, None": NONE,
    "glm4_moe": Glm4Moe(), "lfm2": Lfm2(), "lfm2, raw strings": RAW_STRINGS, "harmony": Harmony(),
    "mistral": Mistral(), "mistral_json": MistralJson(), "deepseek_v3": DeepseekV3(), "deepseek_v31": DeepseekV31(),
    "granite": Granite(), "minimax_m2": MinimaxM2(),
}  # fmt: skip
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
TYPES = {"s": "string", "i": "integer", "n": "number", "b": "boolean", "o": "object", "a": "array"}
TOOLS = [{"function": {"name": "f", "parameters": {"properties": {key: {"type": t} for key, t in TYPES.items()}}}}]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<‹"), max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "s": texts,
        "i": st.integers(),
        "n": st.floats(allow_nan=False, allow_infinity=False),
        "b": st.booleans(),
        "o": st.dictionaries(texts, values, max_size=3),
        "a": st.lists(values, max_size=3),
    },
)


@every_format
@settings(max_examples=60, deadline=None)
@given(made=st.lists(st.builds(ToolCall, st.just("f"), arguments), max_size=3))
def test_whatever_is_written_is_read_back(fmt: ToolFormat, made: list[ToolCall]):
    text = fmt.render("Why.", "I ask.", made)
    turn = fmt.parse(text.encode(), TOOLS)
    assert (turn.reasoning, turn.content, turn.attempts) == ("Why.", "I ask.", made)
    assert turn.spans[-1][1] == len(text.encode())
    assert [c for _, _, c in turn.spans if c is not Component.TOOL_CALL] == [Component.REASONING, Component.ANSWER]
    assert len(turn.spans) == 2 + len(made)  # every call has a span of its own


@every_format
def test_the_markers_of_a_format_stay_text(fmt: ToolFormat):
    for marker in (*fmt.markers, "</function>", "\n</parameter>\n</function>"):
        made = [ToolCall("f", {"s": f"a {marker} b", "o": {marker: [marker]}})]
        turn = fmt.parse(fmt.render(f"r {marker}", f"c {marker}", made).encode(), TOOLS)
        assert len(turn.calls) == 1 and not turn.errors
        assert [c for _, _, c in turn.spans] == [Component.REASONING, Component.ANSWER, Component.TOOL_CALL]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("7", {"type": "string"}, "7"),
        ("7", {"type": "integer"}, 7),
        ("7", {"type": ["string", "integer"]}, "7"),
        ("7", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
        ("null", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("None", {"type": "string", "nullable": True}, None),
        ("null", {"type": "string"}, "null"),
        ("true", {"type": "string"}, "true"),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("1e3", {"type": "number"}, 1000.0),
        ("NaN", {"type": "number"}, "NaN"),
        ("seven", {"type": "integer"}, "seven"),  # the check of the call reports the error
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ('{"a": 1}', {"type": "string"}, '{"a": 1}'),
        ('{"a": 1}', {"type": ["string", "object"]}, {"a": 1}),
        ("{a", {"type": ["string", "object"]}, "{a"),
        ("7", {}, 7),
        ("Paris", {}, "Paris"),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("[" * 100 + "]" * 100, {}, "[" * 100 + "]" * 100),
        ('["\\ud800"]', {}, '["\\ud800"]'),
    ],
)
def test_text_is_read_by_its_declared_type(text, schema, value):
    read = read_value(text, schema)
    assert read == value and type(read) is type(value)


ONE = "<tool_call>\n<function=f>\n<parameter=s>\n{}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("text", ["", "a\n", "\na", "<b>", "</parameter>", "\n</parameter>\nmore", "a & b", "7"])
def test_a_parameter_is_its_text_but_for_one_line_break_at_each_end(text):
    assert Qwen3Coder().parse(ONE.format(text).encode(), TOOLS).calls == [ToolCall("f", {"s": text})]


@pytest.mark.parametrize(
    ("fmt", "text", "reason"),
    [
        (Qwen3Coder(), ONE.replace("=f>", "=g>"), "unknown tool 'g'; tools: f"),
        (Qwen3Coder(), ONE.replace("=s>", "=i>").format("x"), "f: argument 'i' must be integer, not string"),
        (Qwen3Coder(), "<tool_call>\n{}\n</tool_call>", "must begin with <function=NAME>"),
        (Qwen3Coder(), ONE.replace("\n</parameter>", ""), "<parameter=s> is not closed"),
        (Qwen3Coder(), ONE.replace("</function>\n", ""), "<parameter=s> is not closed"),
        (Qwen3Coder(), ONE.replace("<parameter=s>", "s = <parameter=s>"), "expected <parameter=…> or </function>"),
        (Qwen3Coder(), ONE[:-12], "<tool_call> is not closed"),
        (Glm4Moe(), "<tool_call>f\n<arg_key>s</arg_key>\n</tool_call>", "expected <arg_key>KEY</arg_key> and <arg_value>"),
        (Glm4Moe(), "<tool_call>f<arg_key>s</arg_key><arg_value>x</tool_call>", "the value of 's' is not closed"),
        (Glm4Moe(), "<tool_call></tool_call>", "must begin with the name"),
        (Gemma4(), "<|tool_call>f(x=1)<tool_call|>", "the form call:NAME{key:value}"),
        (Gemma4(), "<|tool_call>call:f{s:Paris}<tool_call|>", "'Paris' is no value; write strings as <|\"|>text<|\"|>"),
        (Gemma4(), '<|tool_call>call:f{s:<|"|>Paris}<tool_call|>', "a string is not closed"),
        (Gemma4(), "<|tool_call>call:f{i:1 i:2}<tool_call|>", "expected ','"),
        (Gemma4(), "<|tool_call>call:f{i:1}} <tool_call|>", "unexpected text after the call: '}'"),
        (Gemma4(), "<|tool_call>call:f{a:" + "[" * 99 + "]" * 99 + "}<tool_call|>", "nested deeper than 64"),
        (Gemma4(), "<|tool_call>call:f{i:1}", "<|tool_call> is not closed"),
        (Lfm2(), "<|tool_call_start|>f(i=1)<|tool_call_end|>", "expected '['"),
        (Lfm2(), "<|tool_call_start|>[f(1)]<|tool_call_end|>", "expected key=value"),
        (Lfm2(), "<|tool_call_start|>[f(i=g())]<|tool_call_end|>", "expected a value at 'g())]'"),
        (Lfm2(), "<|tool_call_start|>[f(i=1, i=2)]<|tool_call_end|>", "'i' is given twice"),
        (Lfm2(), "<|tool_call_start|>[]<|tool_call_end|>", "the list of calls is empty"),
        (Lfm2(), "<|tool_call_start|>[f(a=" + "[" * 99 + "]" * 99 + ")]<|tool_call_end|>", "nested deeper than 64"),
        (Lfm2(), "<|tool_call_start|>[f(s='\\ud800')]<|tool_call_end|>", "half of a surrogate pair"),
        (Lfm2(), "<|tool_call_start|>[f(i=1)]", "<|tool_call_start|> is not closed"),
        (Harmony(), " to=functions.f<|channel|>commentary json", "the call of f has no <|message|>"),
        (Harmony(), " to=functions.f<|channel|>commentary json<|message|>{s: 1}", "not valid JSON"),
        (Harmony(), " to=functions.f<|channel|>commentary json<|message|>[1]", "must be a JSON object"),
        (Harmony(), " to=browser.open<|channel|>commentary json<|message|>{}", "unknown tool 'browser.open'"),
        (DeepseekV31(), f"{CALL[0]}f{CALL[1]}", "must have the form NAME<｜tool▁sep｜>{…}"),
        (DeepseekV31(), f"{CALL[0]}f{SEPARATOR}i=1{CALL[1]}", "not valid JSON"),
        (DeepseekV31(), f"{CALL[0]}f{SEPARATOR}[1]{CALL[1]}", "must be a JSON object"),
        (DeepseekV31(), f"{CALL[0]}g{SEPARATOR}{{}}{CALL[1]}", "unknown tool 'g'; tools: f"),
        (DeepseekV31(), f"{SECTION[0]}{CALL[0]}f{SEPARATOR}{{}}", "<｜tool▁call▁begin｜> is not closed"),
        (DeepseekV31(), f"{SECTION[0]}{CALL[0]}f{SEPARATOR}{{}}{SECTION[1]}", "<｜tool▁call▁begin｜> is not closed"),
        (DeepseekV31(), SECTION[0], "<｜tool▁calls▁begin｜> without <｜tool▁call▁begin｜>"),
        (DeepseekV3(), f"{CALL[0]}function{SEPARATOR}f {{}}{CALL[1]}", "a block ```json with the arguments"),
        (DeepseekV3(), f"{CALL[0]}f\n```json\n{{}}\n```{CALL[1]}", "a block ```json with the arguments"),
        (DeepseekV3(), f"{CALL[0]}function{SEPARATOR}f\n```json\n{{}}{CALL[1]}", "the block of the arguments is not closed"),
        (DeepseekV3(), f"{CALL[0]}function{SEPARATOR}f\n```json\n{{i: 1}}\n```{CALL[1]}", "not valid JSON"),
        (Granite(), "<|tool_call|>f(i=1)", "must be a JSON list"),
        (Granite(), "<|tool_call|>[]<|/tool_call|>", "the list of calls is empty"),
        (Granite(), '<|tool_call|>[{"name": "g", "arguments": {}}]<|/tool_call|>', "unknown tool 'g'; tools: f"),
        (MinimaxM2(), "<minimax:tool_call>\n</minimax:tool_call>", "<minimax:tool_call> without <invoke"),
        (MinimaxM2(), "<invoke>\n</invoke>", 'must begin with <invoke name="NAME">'),
        (MinimaxM2(), '<minimax:tool_call><invoke name="f"></minimax:tool_call>', "<invoke is not closed"),
        (MinimaxM2(), '<invoke name="f"><parameter name="s">x</invoke>', "the value of 's' is not closed"),
        (MinimaxM2(), '<invoke name="f">s=x</invoke>', 'expected <parameter name="KEY">'),
        (MinimaxM2(), '<invoke name="f"><parameter name="i">x</parameter></invoke>', "'i' must be integer, not string"),
        (Mistral(), "[TOOL_CALLS][ARGS]{}", "the form [TOOL_CALLS]NAME[ARGS]{…}"),
        (Mistral(), "[TOOL_CALLS]f[ARGS]i=1", "not valid JSON"),
        (Mistral(), '[TOOL_CALLS]f[ARGS]{"i": 1', "not valid JSON"),
        (Mistral(), '[TOOL_CALLS]f[ARGS]{"i": "x"}', "f: argument 'i' must be integer, not string"),
        (Mistral(), "[TOOL_CALLS]g[ARGS]{}", "unknown tool 'g'; tools: f"),
        (MistralJson(), "[TOOL_CALLS] f(i=1)", "must be a JSON list"),
        (MistralJson(), "[TOOL_CALLS] []", "the list of calls is empty"),
        (MistralJson(), '[TOOL_CALLS] [{"name": "f"', "not valid JSON"),
        (MistralJson(), '[TOOL_CALLS] [{"name": "f"} {"name": "f"}]', "the list of calls is not closed"),
        (MistralJson(), '[TOOL_CALLS] [{"name": "g", "arguments": {}}]', "unknown tool 'g'; tools: f"),
        (MistralJson(), f'[TOOL_CALLS] [{{"name": "f", "arguments": {{"a": {"[" * 99}{"]" * 99}}}}}]', "nested deeper than 64"),
    ],
)  # fmt: skip
def test_malformed_calls_say_why(fmt: ToolFormat, text: str, reason: str):
    turn = fmt.parse(text.encode(), TOOLS)
    assert len(turn.errors) == 1 and reason in turn.errors[0] and not turn.calls
    assert turn.spans == [(0, len(text.encode()), Component.TOOL_CALL)]


@pytest.mark.parametrize(
    "header",
    [
        " to=functions.f<|channel|>commentary json<|message|>",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.f<|message|>",
        "<|channel|>analysis to=functions.f<|message|>",
    ],
)
def test_gpt_oss_writes_the_recipient_in_several_places(header: str):
    following = "<|end|><|start|>assistant"
    before = f"<|channel|>analysis<|message|>Why.{following}<|channel|>commentary<|message|>So.{following}"
    turn = Harmony().parse(f'{before}{header}{{"i": 1}}'.encode(), TOOLS)
    assert (turn.reasoning, turn.content, turn.attempts) == ("Why.", "So.", [ToolCall("f", {"i": 1})])
    assert [component for _, _, component in turn.spans] == [Component.REASONING, Component.ANSWER, Component.TOOL_CALL]


def test_text_of_gpt_oss_without_a_header_is_an_answer():
    for text in (
        "Paris.",
        "<|message|>Paris.",
        "<|channel|>final<|message|>Paris.",
        "<|channel|>odd<|message|>Paris.<|end|>",
    ):
        turn = Harmony().parse(text.encode(), TOOLS)
        assert (turn.reasoning, turn.content, turn.attempts) == ("", "Paris.", [])


def test_calls_before_a_malformed_one_are_read():
    found = read_calls("[f(i=1), f(s='it's \"a\" \\u00e9\\n'), f(i=]", TOOLS, 64)
    assert [attempt for _, attempt in found[:2]] == [ToolCall("f", {"i": 1}), ToolCall("f", {"s": 'it\'s "a" é\n'})]
    assert isinstance(found[2][1], str) and len(found) == 3


def test_calls_of_a_list_before_a_malformed_one_are_read_and_text_behind_a_list_is_an_answer():
    call = '{"name": "f", "arguments": {"i": 1}}'
    turn = MistralJson().parse(f"[TOOL_CALLS] [{call}, {{]".encode(), TOOLS)
    assert (
        turn.attempts[0] == ToolCall("f", {"i": 1}) and "not valid JSON" in turn.errors[0] and len(turn.attempts) == 2
    )
    for fmt, text in ((MistralJson(), f"[TOOL_CALLS] [{call}]"), (Mistral(), '[TOOL_CALLS]f[ARGS]{"i": 1}')):
        turn = fmt.parse(f"{text} Wait.".encode(), TOOLS)
        assert (turn.attempts, turn.content) == ([ToolCall("f", {"i": 1})], "Wait.")
        assert turn.spans == [(0, len(text), Component.TOOL_CALL), (len(text), len(text) + 6, Component.ANSWER)]


@pytest.mark.parametrize("between", ["[ARGS]", " [ARGS] ", "[CALL_ID]abc123def[ARGS]", ""])
def test_mistral_calls_with_ids_and_without_markers_are_read(between: str):
    assert Mistral().parse(f'[TOOL_CALLS]f{between}{{"i": 1}}'.encode(), TOOLS).attempts == [ToolCall("f", {"i": 1})]


@pytest.mark.parametrize("fmt", [DeepseekV3(), DeepseekV31()])
def test_the_tags_of_a_section_belong_to_its_first_and_last_call(fmt: ToolFormat):
    calls = [ToolCall("f", {"i": n, "s": "a ``` b"}) for n in range(3)]
    written = fmt.write_calls(calls)
    ends = [n + len(CALL[1]) for n in range(len(written)) if written.startswith(CALL[1], n)][:2]
    turn = fmt.parse(f"So. {written}".encode(), TOOLS)
    assert turn.attempts == calls and turn.content == "So."
    texts = [f"So. {written}".encode()[a:b].decode() for a, b, _ in turn.spans]
    assert texts == ["So.", " " + written[: ends[0]], written[ends[0] : ends[1]], written[ends[1] :]]
