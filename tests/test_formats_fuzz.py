"""Thousands of broken model outputs: nothing raises, nothing hangs, every rejection says why."""

from __future__ import annotations

import gc
import random
import time

import numpy as np
import pytest

from pact_fast.chat.formats.atem import Atem
from pact_fast.chat.formats.base import ToolFormat
from pact_fast.chat.formats.deepseek_v3 import DeepseekV3
from pact_fast.chat.formats.deepseek_v31 import DeepseekV31
from pact_fast.chat.formats.functools_list import Functools
from pact_fast.chat.formats.gemma4 import Gemma4
from pact_fast.chat.formats.glm4_moe import Glm4Moe
from pact_fast.chat.formats.granite import Granite
from pact_fast.chat.formats.harmony import Harmony
from pact_fast.chat.formats.hermes import Hermes
from pact_fast.chat.formats.json_calls import MAX_ERROR, error_observation
from pact_fast.chat.formats.kimi_k2 import KimiK2
from pact_fast.chat.formats.lfm2 import Lfm2
from pact_fast.chat.formats.llama3_json import Llama3Json
from pact_fast.chat.formats.minimax_m2 import MinimaxM2
from pact_fast.chat.formats.mistral import Mistral
from pact_fast.chat.formats.mistral_json import MistralJson
from pact_fast.chat.formats.pythonic import Pythonic
from pact_fast.chat.formats.qwen3_coder import Qwen3Coder
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import Component
from pact_fast.data.types import ToolCall
from tests.support.chat_tokenizers import chatml_like, llama3_like
from tests.support.fuzz import cases

FORMATS = pytest.mark.parametrize(
    "fmt",
    [
        Hermes(),
        Llama3Json(),
        Qwen3Coder(),
        Gemma4(),
        Lfm2(),
        Glm4Moe(),
        Harmony(),
        Mistral(),
        MistralJson(),
        DeepseekV3(),
        DeepseekV31(),
        Granite(),
        MinimaxM2(),
        Atem(),
        Functools(),
        KimiK2(),
        Pythonic(),
        Pythonic().variants()[1],
    ],
    ids=lambda f: type(f).__name__,
)
SEEDS = [
    ("Think about it.", "", [ToolCall("f", {"x": 1})]),
    ("", "I look it up.", [ToolCall("get_weather", {"city": "Paris", "days": [1, 2.5, None]})] * 3),
    ("Well.\n- one\n- two", "The answer is 42.", []),
    ("", "", [ToolCall("f", {"x": {"deep": {"er": ["é", "\U0001f642", "\\u"]}}})]),
]
SPLICES = [
    b"<tool_call>", b"</tool_call>", b"<think>", b"</think>", b"<|im_end|>", b"<|python_tag|>", b"{", b"}", b"[", b'"',
    b"\\", b":", b",", b"; ", b'{"name": ', b'"arguments": ', b'"parameters": {}', b"NaN", b"-Infinity", b"1e999",
    b"<arg_key>x</arg_key>", b"<arg_value>", b"</arg_value>",
    b"<function=", b"</function>", b"<parameter=x>", b"</parameter>", b"<|tool_call>", b"<tool_call|>", b'<|"|>', b"call:f{",
    b"<|channel>thought", b"<channel|>", b"<|tool_call_start|>[", b"]<|tool_call_end|>", b"f(x=", b")", b"'", b"True",
    "<｜tool▁call▁begin｜>".encode(), "<｜tool▁call▁end｜>".encode(), "<｜tool▁sep｜>".encode(), b"```", b"\n```json\n",
    "<｜tool▁calls▁begin｜>".encode(), "<｜tool▁calls▁end｜>".encode(),
    b"<|tool_call|>", b"<|/tool_call|>", b"<minimax:tool_call>", b"</minimax:tool_call>", b'<invoke name="f">', b"</invoke>",
    b"<|eom|>", b"<|start|>assistant", b" to=f<|message|>", b" to=self<|message|>", b"<atem:function_calls>",
    b'<atem:invoke name="f">', b"</atem:invoke>", b'<atem:parameter name="x">', b"</atem:parameter>", b"functools[",
    b"<|tool_calls_section_begin|>", b"<|tool_calls_section_end|>", b"<|tool_call_begin|>", b"<|tool_call_end|>",
    b"<|tool_call_argument_begin|>", b"functions.f:0", b"[f(x=", b")]", b"<|python_start|>", b"<|python_end|>",
    b'<parameter name="x">', b"[TOOL_CALLS]", b"[ARGS]", b"[CALL_ID]", b"[THINK]", b"[TOOL_CALLS] [{",
    b"\\ud800", b"\xff", b"\xc3", b"\x00", b"null", b"\n", b"9" * 5000, b"[" * 3000, b'{"name":' * 500,
]  # fmt: skip
TOOLS = [
    {"function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}, "required": ["x"]}}},
    {"function": {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}}},
]


def mutate(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.randint(1, 6)):
        a, b = sorted(rng.choices(range(len(data) + 1), k=2))
        kind = rng.randrange(6)
        if kind == 0:  # truncate
            data = data[:b]
        elif kind == 1:  # delete
            data = data[:a] + data[min(b, a + 12) :]
        elif kind == 2:  # insert
            data = data[:a] + rng.choice(SPLICES) + data[a:]
        elif kind == 3:  # repeat
            data = data[:a] + data[a:b] * rng.randint(2, 4) + data[b:]
        elif kind == 4 and data:  # flip bits
            place = rng.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        else:  # nest
            data = data[:a] + data[a:b] + data[a:]
        data = data[:20_000]
    return data


def check(turn, length: int) -> None:
    position = 0
    for start, end, component in turn.spans:
        assert start == position < end and component in (Component.REASONING, Component.TOOL_CALL, Component.ANSWER)
        position = end
    assert position == length
    # every attempt has its span, and a rejection has a reason that can be shown to the model
    assert len(turn.attempts) <= sum(component is Component.TOOL_CALL for _, _, component in turn.spans)
    for attempt in turn.attempts:
        if isinstance(attempt, str):
            assert 10 < len(attempt) < 1000
            assert len(error_observation(attempt)) <= MAX_ERROR
            error_observation(attempt).encode()
        else:
            assert attempt.name in ("f", "get_weather")
            str(attempt.to_json()).encode()


@pytest.mark.slow
@FORMATS
def test_mutated_turns(fmt: ToolFormat):
    rng = random.Random(7)
    rejected = accepted = 0
    number = cases()
    for _ in range(number):
        data = mutate(rng, fmt.render(*rng.choice(SEEDS)).encode())
        turn = fmt.parse(data, TOOLS, thinking=rng.random() < 0.1)
        check(turn, len(data))
        rejected += len(turn.errors)
        accepted += len(turn.calls)
    assert min(rejected, accepted) > number / 20  # the mutations neither miss nor destroy everything


@pytest.mark.parametrize("make", [chatml_like, llama3_like])
def test_random_and_mutated_ids(make):
    renderer = ChatRenderer(make())
    rng, numbers = random.Random(1), np.random.default_rng(1)
    turns = [renderer.assistant_turn(*seed)[0] for seed in SEEDS]
    size = len(renderer.token_bytes.table) + 50
    for _ in range(1000):
        ids = rng.choice(turns).copy()
        for _ in range(rng.randint(0, 8)):
            place = rng.randrange(len(ids))
            if rng.random() < 0.3:
                ids[place] = rng.choice(sorted(renderer.control_ids))
            else:
                ids = np.concatenate([ids[:place], numbers.integers(0, size, rng.randint(0, 5)), ids[place + 1 :], [3]])
        turn = renderer.parse(ids[: rng.randint(0, len(ids))] if rng.random() < 0.5 else ids, TOOLS)
        check(turn, turn.spans[-1][1] if turn.spans else 0)
        assert set(turn.components) <= {Component.REASONING, Component.TOOL_CALL, Component.ANSWER}


LENGTH = 150_000  # bytes
LIMIT = 0.15  # seconds, for milliseconds of work; a loop over all pairs of tags takes more
LONG = [
    b"<tool_call>", b"</tool_call>", b"<tool_call>{", b"<think>", b"{", b'{"name":', b'{"name":[', b'{"name":"',
    b'{"name": "f", "parameters": {"x": ', b'{"name":"f","parameters":{}};', b'{"name":"a"}x', b'{"type":1,',
    b"<|python_tag|>", b"<|python_tag|> ", b"; ", b" ", b"\\", b'"', b"\xff", b"{ ", b'{ "name" ',
]  # fmt: skip
LONG_TAGS = [  # of the formats with tags
    b"<arg_key>", b"<arg_key>x</arg_key><arg_value>", b"</arg_value> ",
    b"<parameter=x>", b"<function=f>", b"\n</parameter>\n", b"<parameter=x></parameter>", b"<tool_call><function=f>",
    b"<|tool_call>", b"<|tool_call>call:f{", b"{x:", b'<|"|>', b"call:f{x:[", b'<|"|>,', b"<|channel>", b"x:11111111,", b"[1,",
    b"<|message|>", b"<|end|>", b"<|start|>assistant", b"to=", b"to=f<|message|>{}<|call|>", b"<|end|><|start|>assistant",
    b"<|tool_call_start|>", b"<|tool_call_start|>[f(", b"f(x='", b"f(x=1), ", b"'", b"' ", b"x='a', ", b"\\'", b"[[",
    b"[TOOL_CALLS]", b"[TOOL_CALLS]f[ARGS]{", b"[TOOL_CALLS]f[ARGS]{} ", b"[TOOL_CALLS]f", b"[ARGS]", b"[CALL_ID]",
    b"[TOOL_CALLS][", b'[TOOL_CALLS] [{"name":"f","arguments":{}}', b'{"name":"f","arguments":{}},', b"{},",
    "<｜tool▁calls▁begin｜>".encode(), "<｜tool▁calls▁begin｜> ".encode(), "<｜tool▁call▁begin｜>".encode(), b"``` ",
    "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>".encode(), "<｜tool▁call▁end｜> ".encode(), b"```json",
    "<｜tool▁calls▁end｜>".encode(), "<｜tool▁sep｜>".encode(),
    b"<|tool_call|>[", b'<|tool_call|>[{"name":"f","arguments":{}}', b"<|/tool_call|>", b"]<|/tool_call|>",
    b"<minimax:tool_call>", b"<minimax:tool_call> ", b"<invoke", b'<invoke name="f">', b"</invoke> ", b'<parameter name="x">',
    b"</parameter> ", b'<parameter name="x"></parameter>',
    b"<|eom|>", b" to=f<|message|>", b'<atem:parameter name="x">', b"</atem:parameter> ", b"<atem:invoke",
    b'<atem:parameter name="x"></atem:parameter>', b"<|eom|><|start|>assistant to=f<|message|>",
    b"functools[", b'functools[{"name":"f","arguments":{}}', b"functools", b"<|python_start|>", b"<|python_end|>",
    b"<|tool_calls_section_begin|>", b"<|tool_call_begin|>", b"<|tool_call_end|> ", b"<|tool_call_argument_begin|>",
    b"<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>", b"[f(", b"[g(", b'[f(x="', b'" ',
]  # fmt: skip


FRAMES = {
    Hermes: [(b"<tool_call>", b"</tool_call>")],
    Llama3Json: [],
    Qwen3Coder: [
        (b"<tool_call><function=f>", b"</function></tool_call>"),
        (b"<tool_call><function=f><parameter=x>", b"</parameter></function></tool_call>"),
    ],
    Glm4Moe: [(b"<tool_call>f", b"</tool_call>"), (b"<tool_call>f<arg_key>x</arg_key><arg_value>", b"</tool_call>")],
    Gemma4: [(b"<|tool_call>call:f{", b"}<tool_call|>"), (b"<|tool_call>call:f{x:[", b"]}<tool_call|>")],
    Harmony: [(b" to=functions.f<|message|>", b"<|call|>"), (b"<|channel|>analysis<|message|>", b"<|end|>")],
    DeepseekV3: [
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n".encode(), "\n```<｜tool▁call▁end｜>".encode())
    ],
    DeepseekV31: [("<｜tool▁call▁begin｜>f<｜tool▁sep｜>".encode(), "<｜tool▁call▁end｜>".encode())],
    Granite: [(b"<|tool_call|>[", b"]"), (b'<|tool_call|>[{"name": "f", "arguments": {"x": ', b"}}]<|/tool_call|>")],
    MinimaxM2: [
        (b"<minimax:tool_call>", b"</minimax:tool_call>"),
        (b'<invoke name="f">', b"</invoke>"),
        (b'<invoke name="f"><parameter name="x">', b"</parameter></invoke>"),
    ],
    Mistral: [(b'[TOOL_CALLS]f[ARGS]{"x":', b"}"), (b"[TOOL_CALLS]", b"[ARGS]{}"), (b"[TOOL_CALLS]f[CALL_ID]", b"")],
    MistralJson: [(b"[TOOL_CALLS] [", b"]"), (b'[TOOL_CALLS] [{"name": "f", "arguments": {"x": ', b"}}]")],
    Atem: [
        (b" to=f<|message|>", b"<|eom|>"),
        (b' to=f<|message|><atem:function_calls>\n<atem:invoke name="f">', b"</atem:invoke>"),
        (b' to=f<|message|><atem:invoke name="f"><atem:parameter name="x">', b"</atem:parameter></atem:invoke>"),
    ],
    Functools: [(b"functools[", b"]"), (b'functools[{"name": "f", "arguments": {"x": ', b"}}]")],
    KimiK2: [
        (b"<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>", b"<|tool_call_end|>"),
        (b"<|tool_calls_section_begin|><|tool_call_begin|>", b"<|tool_call_end|><|tool_calls_section_end|>"),
    ],
    Pythonic: [(b"[", b"]"), (b"[f(", b")]"), (b"[f(x='", b"')]"), (b'[f(x="', b'")]')],
    Lfm2: [
        (b"<|tool_call_start|>[", b"]<|tool_call_end|>"),
        (b"<|tool_call_start|>[f(", b")]<|tool_call_end|>"),
        (b"<|tool_call_start|>[f(x='", b"')]<|tool_call_end|>"),
    ],
}


def places(fmt: ToolFormat, unit: bytes) -> list[tuple[bytes, bytes]]:
    """Return (before, after) contexts of a repeated unit: all if the unit means something to the format, else two."""
    every = [(b"", b""), (b"text ", b"}"), *FRAMES[type(fmt)]]
    written = b" ".join([*(fmt.render(*seed).encode() for seed in SEEDS), *(part for pair in every for part in pair)])
    known = unit in LONG or unit.strip() in written or any(marker.encode() in unit for marker in fmt.markers)
    return every if known else [every[0], *every[2:3]]


@pytest.mark.timing
@FORMATS
@pytest.mark.slow
def test_a_long_text_of_anything_takes_linear_time(fmt: ToolFormat):
    gc.disable()  # a collection takes longer than a text
    try:
        for unit in LONG if isinstance(fmt, Llama3Json) else [*LONG, *LONG_TAGS]:
            for head, tail in places(fmt, unit):
                data = head + unit * (LENGTH // len(unit)) + tail
                begin = time.process_time()
                check(fmt.parse(data, TOOLS), len(data))
                assert time.process_time() - begin < LIMIT, unit
    finally:
        gc.enable()
