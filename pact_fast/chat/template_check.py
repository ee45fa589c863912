"""Check at start-up: appended turns must equal the chat template's own rendering of the conversation."""

from __future__ import annotations

import re

import numpy as np

from pact_fast.chat.chat_template import call_message
from pact_fast.chat.formats.base import END_THINK, THINK
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.data.types import Message, ToolCall, ToolSchema
from pact_fast.errors import PactError
from pact_fast.limits import memory_limit

MEMORY = 2**30  # it takes none to speak of

_TOOL: ToolSchema = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}
_PROMPT: list[Message] = [{"role": "system", "content": "Use the tools."}, {"role": "user", "content": "Who is it?"}]
_TURNS: list[list[Message]] = [  # messages after each assistant turn of the trial conversation
    [{"role": "tool", "name": "look_up", "content": "first result"}],
    [{"role": "tool", "name": "look_up", "content": '{"second": "result"}'}],
    [{"role": "tool", "name": "look_up", "content": "third."}, {"role": "user", "content": "Again: who is it?"}],
]


def check_template(renderer: ChatRenderer) -> None:
    """PactError with reason and cure if template, tokenizer and tool format do not work together, or take too much."""
    with memory_limit(MEMORY, "the chat template (set model.chat_template to another one)"):
        _check_clock(renderer)
        _check_tools(renderer)
        _check_plain(renderer)
        _check_round_trip(renderer)
        _check_ids(renderer)
        _check_texts(renderer)


def _check_clock(renderer: ChatRenderer) -> None:
    """A date in the prompt makes a run depend on the day, and a resumed run differ from itself."""
    try:
        # transformers passes templates a function of this name; with a string in its place, templates that call it fail
        renderer.template.render(_PROMPT, [_TOOL], strftime_now="")
    except PactError:
        raise PactError(
            "the chat template writes today's date into the prompt, so the same task is another prompt tomorrow; set "
            "model.chat_template to a copy with a fixed date"
        ) from None


def _check_tools(renderer: ChatRenderer) -> None:
    if "look_up" not in renderer.template.render(_PROMPT, [_TOOL]):
        raise PactError(
            "the chat template does not show the tools to the model; set model.chat_template to one that does"
        )


def _check_plain(renderer: ChatRenderer) -> None:
    text = 'Look: "é"\n{}'
    encoded = renderer.token_bytes.join(renderer.encoder.plain(text)).decode("utf-8", "replace")
    if encoded != text:
        raise PactError(
            f"the tokenizer changes the text that it encodes ({text!r} becomes {encoded!r}), so turns cannot be put "
            "together from parts; use a byte-level BPE tokenizer"
        )


def _check_round_trip(renderer: ChatRenderer) -> None:
    """A rendered turn must parse to the same turn, with the same components."""
    calls = [ToolCall("look_up", {"key": 'a "b" é'}), ToolCall("look_up", {"key": "1"})]
    for reasoning, content, made in (("Look.", "", calls), ("", "Wait.", calls[:1]), ("Think.\nTwice.", "Done.", [])):
        ids, components = renderer.assistant_turn(reasoning, content, made)
        turn = renderer.parse(ids, [_TOOL])
        if (turn.reasoning, turn.content, turn.attempts) != (reasoning, content, made):
            raise PactError(
                f"the tool format {type(renderer.format).__name__} does not parse what it renders: {turn.text!r} gives "
                f"{turn.attempts}; choose another model.tool_format"
            )
        if not np.array_equal(turn.components, components):
            raise PactError(
                "with this tokenizer, rendered and sampled tokens get different components; use a byte-level BPE tokenizer"
            )


def _check_texts(renderer: ChatRenderer) -> None:
    """After every turn, prompt, turns and bridge tokens must decode to the template's rendering of the conversation.

    Templates keep, strip or blank the reasoning of earlier turns. So the turns compared have no reasoning, and empty
    think blocks are ignored.
    """
    messages = list(_PROMPT)
    for number, following in enumerate(_TURNS, start=1):
        messages += [call_message(_call(number)), *following]
        ours = _comparable(_text(renderer, _appended(renderer, "", number)))
        theirs = _comparable(renderer.template.render(messages, [_TOOL], generate=True))
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            raise PactError(
                f"after turn {number} the chat template renders the conversation differently than before (it writes "
                f"{theirs[at : at + 40]!r} instead of {ours[at : at + 40]!r}), so turns cannot be appended; set "
                "model.chat_template to one that keeps what it has written"
            )


def _check_ids(renderer: ChatRenderer) -> None:
    """The appended ids must be those that the tokenizer gives the whole text, seams between the parts included."""
    ids = _appended(renderer, "Look.", len(_TURNS))
    if renderer.tokenizer.encode(_text(renderer, ids), add_special_tokens=False) != ids.tolist():
        raise PactError(
            "appended turns do not have the token ids that the tokenizer gives the whole conversation (it may strip "
            "blanks around special tokens); use a byte-level BPE tokenizer"
        )


def _appended(renderer: ChatRenderer, reasoning: str, turns: int) -> np.ndarray:
    ids = [renderer.prompt_ids(_PROMPT, [_TOOL])]
    for number, following in enumerate(_TURNS[:turns], start=1):
        ids += [renderer.assistant_turn(reasoning, "", [_call(number)])[0], renderer.bridge_ids(following)]
    return np.concatenate(ids)


def _call(number: int) -> ToolCall:
    return ToolCall("look_up", {"key": f"k{number}"})


def _text(renderer: ChatRenderer, ids: np.ndarray) -> str:
    return renderer.token_bytes.join(ids).decode("utf-8", "replace")


def _comparable(text: str) -> str:
    return re.sub(rf"{THINK}\s*{END_THINK}\s*", "", text)
