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
            assert text == _rendered(renderer, content, calls, results)
            assert ids.tolist() == renderer.tokenizer.encode(text, add_special_tokens=False)


def _rendered(renderer: ChatRenderer, content: str, calls: list[ToolCall], results: list[dict]) -> str:
    made = [{"type": "function", "function": call.to_json()} for call in calls]
    messages = [QUESTION, {"role": "assistant", "content": content, "tool_calls": made}, *results]
    return renderer.template.render(messages, TOOLS, generate=True)
