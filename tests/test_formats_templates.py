"""Every tool-calling chat template of trl: the format found for it, and its own rendering against ours; or why not."""

from __future__ import annotations

import numpy as np
import pytest

from pact_fast.chat.chat_template import QUESTION
from pact_fast.chat.formats.lfm2 import Lfm2
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.template_check import check_template
from pact_fast.components import Component
from pact_fast.errors import PactError
from tests.support.call_samples import CALLS, TOOLS
from tests.support.chat_tokenizers import build, template
from tests.support.trl_templates import comparable, tokenizer_for, tool_calling

pytest.importorskip("trl")  # for its chat templates
UNKNOWN = "none of the known formats"
NO_TOOLS = "does not show the tools"
DIFFERS = "renders the conversation differently than before"
HERMES = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl")
QWEN3_CODER = (
    "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8",
    "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning",
)  # fmt: skip
GEMMA4 = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")
GIVEN = (
    "lfm2",
    "lfm2_training",
)  # accepted with model.tool_format=lfm2: the template drops the calls, which are text then
LFM2 = ("lfm2_v2", "lfm2_v2_training", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl")
ACCEPTED = {
    **{name + end: "Hermes" for name in HERMES for end in ("", "_training")},
    **{name + end: "Qwen3Coder" for name in QWEN3_CODER for end in ("", "_training")},
    "llama3_1": "Llama3Json",
    "llama3_2": "Llama3Json",
    "gptoss": "Harmony",
    "gptoss_training": "Harmony",
    "glm4moe": "Glm4Moe",
    "glm4moe_training": "Glm4Moe",
    "muse_glimmer": "Atem",
    "muse_glimmer_training": "Atem",
    **dict.fromkeys(GEMMA4, "Gemma4"),
    **dict.fromkeys(LFM2, "Lfm2"),
    **dict.fromkeys(GIVEN, "Lfm2"),
}
DATED = ("llama3_2", "gptoss", "gptoss_training", "muse_glimmer", "muse_glimmer_training")
VARIABLES = {name: {"strftime_now": "2025-06-30"} for name in DATED}
REFUSED = {
    "llama3_2": "writes today's date",  # accepted with the date as a variable
    "deepseekv3": NO_TOOLS,
    "deepseekv3_training": NO_TOOLS,
    "lfm2": UNKNOWN,
    "lfm2_training": UNKNOWN,
    "diffusion_gemma": DIFFERS,  # after a result, it opens the model's turn again once the conversation goes on
    "diffusion_gemma_training": DIFFERS,
    "gptoss": "today's date",
    "gptoss_training": "today's date",
    "muse_glimmer": "today's date",  # where the prompt has no system message
    "muse_glimmer_training": "today's date",
}


def renderer_for(name: str) -> ChatRenderer:
    return ChatRenderer(tokenizer_for(name), Lfm2() if name in GIVEN else None, VARIABLES.get(name))


def test_every_template_is_in_the_table():
    assert set(tool_calling()) == {*ACCEPTED, *REFUSED} and set(ACCEPTED) & set(REFUSED) == {*VARIABLES, *GIVEN}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(PactError, match=REFUSED[name]):
        check_template(ChatRenderer(tokenizer_for(name)))


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    renderer = renderer_for(name)
    assert type(renderer.format).__name__ == ACCEPTED[name]
    check_template(renderer)
    several = [CALLS[:3]] if renderer.template.several_calls else []  # Llama's and gpt-oss's take one call per turn
    for calls in [*([call] for call in CALLS), *several]:
        turn, components = renderer.assistant_turn("", "", calls)
        parsed = renderer.parse(turn, TOOLS)
        assert parsed.attempts == calls
        assert np.array_equal(parsed.components, components)
        results = [{"role": "tool", "name": "f", "content": f"result {n}"} for n, _ in enumerate(calls)]
        ids = np.concatenate([renderer.prompt_ids([QUESTION], TOOLS), turn, renderer.bridge_ids(results)])
        text = renderer.token_bytes.join(ids).decode()
        entries = [{"type": "function", "function": call.to_json()} for call in calls]
        messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": entries}, *results]
        whole = renderer.template.render(messages, TOOLS, generate=True)
        if not (ACCEPTED[name] == "Lfm2" and "\\" in str(calls[0].arguments.get("text"))):  # it escapes nothing
            assert comparable(renderer, text) == comparable(renderer, whole)
        assert ids.tolist() == renderer.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ACCEPTED)
def test_reasoning_stands_where_the_template_writes_it(name):
    """A turn with reasoning, text and a call, whose template shows reasoning, is the template's own."""
    renderer = renderer_for(name)
    for content in ("", "I ask."):
        turn, components = renderer.assistant_turn("Look\nit up.", content, CALLS[:1], end=False)
        parsed = renderer.parse(turn, TOOLS)
        assert (parsed.reasoning, parsed.content, parsed.attempts) == ("Look\nit up.", content, CALLS[:1])
        assert np.array_equal(parsed.components, components)
        assert set(components) == {Component.REASONING, Component.TOOL_CALL} | (
            {Component.ANSWER} if content else set()
        )
        ours = renderer.token_bytes.join(np.concatenate([renderer.prompt_ids([QUESTION], TOOLS), turn])).decode()
        message = {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"type": "function", "function": CALLS[0].to_json()}],
            "reasoning_content": "Look\nit up.",
        }
        if ACCEPTED[name] in ("Harmony", "Atem") and content:
            continue  # their templates take either text or reasoning beside a call, or no text
        theirs = renderer.template.render([QUESTION, message], TOOLS)
        if ACCEPTED[name] == "Gemma4" and content:
            continue  # its templates put the text of a message behind its calls
        if "it up." in theirs and ">\n\n</think>" not in ours:  # a prompt may have closed the reasoning
            assert theirs.startswith(ours)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v5"])
def test_results_of_several_tools_are_named_after_their_calls(name):
    renderer = renderer_for(name)
    results = [{"role": "tool", "name": tool, "content": f"of {tool}"} for tool in ("f", "g", "f")]
    text = renderer.token_bytes.join(renderer.bridge_ids(results)).decode()
    named = [f'response:{tool}{{value:<|"|>of {tool}<|"|>}}<tool_response|>' for tool in ("f", "g", "f")]
    assert text == "<|tool_response>".join(named)


def test_no_turn_holds_the_token_that_ends_calls_special_or_not():
    tokenizer = build(
        template("gemma4"), ("<|endoftext|>", "<turn|>", "<|turn>"), ("<|tool_response>",), "<|endoftext|>"
    )
    renderer = ChatRenderer(tokenizer)
    assert renderer.call_eot == "<|tool_response>"
    turn, _ = renderer.assistant_turn("", "I write <|tool_response> and call.", CALLS[:1])
    assert (turn == renderer.call_eot_id).nonzero()[0].tolist() == [len(turn) - 1]


def test_a_turn_ends_as_the_template_ends_it():
    gemma, glm, qwen = (renderer_for(name) for name in ("gemma4", "glm4moe", "qwen3_6"))
    assert gemma.ends == ("<turn|>", "<|tool_response>")
    assert glm.ends == ("<|user|>", "<|observation|>")
    assert qwen.ends == ("<|im_end|>", "<|im_end|>")
    for renderer in (gemma, glm, qwen):
        for calls, end in (([], renderer.eot_id), (CALLS[:1], renderer.call_eot_id)):
            ids, _ = renderer.assistant_turn("", "Hm.", calls)
            assert ids[-1] == end and end in renderer.stop_ids(at_tool_call=False)
            assert renderer.parse(ids, TOOLS).text == renderer.parse(ids[:-1], TOOLS).text
