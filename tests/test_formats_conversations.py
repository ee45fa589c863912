"""Formats of models whose templates trl does not ship: detected, written as the template does, and read back by tokens."""

from __future__ import annotations

import numpy as np
import pytest

from pact_fast.chat.chat_template import QUESTION
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.template_check import check_template
from pact_fast.components import Component
from pact_fast.data.types import ToolCall
from tests.support.call_samples import CALLS, TOOLS
from tests.support.call_templates import TEMPLATES, tokenizer_for

FORMATS = {
    "functools": "Functools",
    "kimi_k2": "KimiK2",
    "pythonic": "Pythonic",
    "pythonic, quoted": "Pythonic",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v3, any arguments": "DeepseekV3",
    "deepseek_v31": "DeepseekV31",
    "granite": "Granite",
    "granite, closed": "Granite",
    "minimax_m2": "MinimaxM2",
    "mistral": "Mistral",
    "mistral_json": "MistralJson",
    "mistral_json, no blank": "MistralJson",
}


def test_every_template_has_a_format():
    assert FORMATS.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_conversation_is_the_templates_own(name):
    renderer = ChatRenderer(tokenizer_for(name))
    assert type(renderer.format).__name__ == FORMATS[name]
    assert check_template(renderer) == []
    for content in ("", "I ask."):
        for calls in (*([call] for call in CALLS), CALLS[:3]):
            turn, components = renderer.assistant_turn("", content, calls)
            parsed = renderer.parse(turn, TOOLS)
            assert (parsed.content, parsed.attempts) == (content, calls)
            assert np.array_equal(parsed.components, components)
            assert set(components) == {Component.TOOL_CALL} | ({Component.ANSWER} if content else set())
            results = [{"role": "tool", "name": "f", "content": f"result {n}"} for n, _ in enumerate(calls)]
            ids = np.concatenate([renderer.prompt_ids([QUESTION], TOOLS), turn, renderer.bridge_ids(results)])
            text = renderer.token_bytes.join(ids).decode()
            if name != "pythonic, quoted" or "\\" not in str(calls[0].arguments.get("text")):  # it escapes nothing
                assert text == _rendered(renderer, content, calls, results)
            assert ids.tolist() == renderer.tokenizer.encode(text, add_special_tokens=False)


def _rendered(renderer: ChatRenderer, content: str, calls: list[ToolCall], results: list[dict]) -> str:
    made = [{"type": "function", "function": call.to_json()} for call in calls]
    messages = [QUESTION, {"role": "assistant", "content": content, "tool_calls": made}, *results]
    return renderer.template.render(messages, TOOLS, generate=True)


def test_kimi_pairs_results_with_ids_that_hold_the_tools_name():
    renderer = ChatRenderer(tokenizer_for("kimi_k2"))
    results = [{"role": "tool", "name": name, "content": f"of {name}"} for name in ("f", "g", "f")]
    text = renderer.token_bytes.join(renderer.bridge_ids(results)).decode()
    for n, name in enumerate(("f", "g", "f")):
        assert f"<|im_system|>{name}<|im_middle|>## Return of functions.{name}:{n}\nof {name}<|im_end|>" in text
    read = renderer.format.parse(
        b'<|tool_calls_section_begin|><|tool_call_begin|>functions.f:17 <|tool_call_argument_begin|>{"count": 1}'
        b"<|tool_call_end|><|tool_calls_section_end|>",
        TOOLS,
    )
    assert read.attempts == [ToolCall("f", {"count": 1})]  # a model may count through the conversation


@pytest.mark.parametrize(
    ("text", "attempts"),
    [
        ('[f(text="7", count=7)]', [ToolCall("f", {"text": "7", "count": 7})]),
        ("<|python_start|>[f(count=1), f()]<|python_end|>", [ToolCall("f", {"count": 1}), ToolCall("f", {})]),
        ("I ask. [f(flag=True)]", [ToolCall("f", {"flag": True})]),
        ("The list is [a(1)], or [see(below)].", []),  # no known tool
        ("[1, 2] and [x]", []),
    ],
)
def test_a_python_list_is_a_call_where_it_begins_the_turn_or_names_a_tool(text, attempts):
    renderer = ChatRenderer(tokenizer_for("pythonic"))
    assert renderer.format.parse(text.encode(), TOOLS).attempts == attempts


def test_functools_is_a_word_unless_a_list_follows():
    fmt = ChatRenderer(tokenizer_for("functools")).format
    assert fmt.parse(b"Use functools, or functools.reduce[0].", TOOLS).attempts == []
    assert fmt.parse(b'functools [{"name": "f", "arguments": {}}]', TOOLS).attempts == [ToolCall("f", {})]
