"""Check at start-up: appended turns must equal the chat template's own rendering of the conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pact_fast.chat.call_ids import with_call_ids
from pact_fast.chat.chat_template import PROBE_NAME, PROBE_TOOL, call_message
from pact_fast.chat.history import CURES, LabelledTokens, concatenate, labelled_prompt
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.data.types import Message, ToolCall
from pact_fast.errors import PactError
from pact_fast.limits import memory_limit

MEMORY = 2**30  # it takes none to speak of

_PROMPT: list[Message] = [{"role": "system", "content": "Use the tools."}, {"role": "user", "content": "Who is it?"}]
_RESULTS: list[list[str]] = [["first result"], ['{"second": "result"}', "and another"], ["third."]]  # of every turn
_AGAIN: Message = {"role": "user", "content": "Again: who is it?"}  # after the last turn
_REASONING = "Zq0Zwhy\nso."  # no template contains or changes it

Turn = tuple[str, list[ToolCall], list[Message]]  # text and calls of a turn, and the messages after it


def check_template(renderer: ChatRenderer) -> list[str]:
    """PactError with reason and cure if template, tokenizer and tool format do not work together, or take too much.

    Returns notes, one line each, on supported but unusual behaviour.
    """
    with memory_limit(MEMORY, "the chat template (set model.chat_template to another one)"):
        _check_clock(renderer)
        _check_tools(renderer)
        _check_plain(renderer)
        _check_round_trip(renderer)
        turns = _tool_turns(renderer)
        _check_ids(renderer, turns)
        return _check_texts(renderer, turns)


def check_user_turns(renderer: ChatRenderer, after_results: bool = False) -> list[str]:
    """PactError with reason and cure if a user cannot speak between turns: see docs/conversations.md.

    `after_results`: also right behind the results of calls, as in some expert traces. Returns notes, as `check_template` does,
    which checks the rest.
    """
    with memory_limit(MEMORY, "the chat template (set model.chat_template to another one)"):
        turns = _user_turns(renderer)
        if renderer.history.drops_reasoning:
            _check_rewritten(renderer, [*turns, _tool_turns(renderer)[-1], turns[0]] if after_results else turns)
            return [
                "the chat template drops the reasoning of earlier turns once the user speaks again: a rollout branches there"
            ]
        _check_ids(renderer, turns)
        return _check_texts(renderer, turns)


def _check_rewritten(renderer: ChatRenderer, turns: Sequence[Turn]) -> None:
    """Whenever the user has spoken, the tokens must be those of the template's rendering, without earlier reasoning."""
    pieces, messages = [labelled_prompt(renderer.prompt_ids(_PROMPT, [PROBE_TOOL]))], list(_PROMPT)
    for text, calls, following in turns:
        bridge = renderer.bridge_tokens(following)
        turn, said = (
            LabelledTokens(ids, components, np.zeros(len(ids), np.int16))
            for ids, components in (renderer.assistant_turn(_REASONING, text, calls), bridge)
        )
        pieces.append(turn)
        thought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _REASONING)
        spoken = call_message(*calls) if calls else {"role": "assistant", "content": text}
        messages += [{**spoken, **thought}, *following]
        spoke = following[-1]["role"] == "user"
        if spoke and renderer.history.rewrites(replied=not calls):
            keep, tokens = renderer.history.continuation(pieces, said, replied=not calls)
            pieces = [concatenate([concatenate(pieces)[:keep], tokens])]
        else:
            pieces.append(said)
        if not spoke:
            continue
        ids = concatenate(pieces).ids
        ours, theirs = _text(renderer, ids), _rendered(renderer, messages)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            raise PactError(
                "the chat template drops the reasoning of earlier turns once the user speaks again, and changes more than "
                f"that (it writes {theirs[at : at + 40]!r} instead of {ours[at : at + 40]!r}), so a dialogue with a user "
                f"cannot be rendered; {CURES}"
            )
        if renderer.tokenizer.encode(ours, add_special_tokens=False) != ids.tolist():
            raise PactError(
                "without the reasoning of earlier turns, a conversation does not have the token ids that the tokenizer gives "
                f"it; use a byte-level BPE tokenizer, or {CURES}"
            )


def _check_clock(renderer: ChatRenderer) -> None:
    """A date in the prompt makes a run depend on the day, and a resumed run differ from itself."""
    for messages in (_PROMPT, _PROMPT[1:]):  # some write it only where there is no system message
        if messages is not _PROMPT:
            try:
                renderer.template.render(messages, [PROBE_TOOL])
            except PactError:  # some need one
                continue
        try:
            # transformers passes templates a function of this name; with a string in its place, templates that call it fail
            renderer.template.render(messages, [PROBE_TOOL], strftime_now="")
        except PactError:
            raise PactError(
                "the chat template writes today's date into the prompt, so the same task is another prompt tomorrow; fix "
                "the date: model.chat_template_kwargs={strftime_now: 2025-06-30}"
            ) from None


def _check_tools(renderer: ChatRenderer) -> None:
    if PROBE_NAME not in renderer.template.render(_PROMPT, [PROBE_TOOL]):
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
    calls = [ToolCall(PROBE_NAME, {"key": 'a "b" é'}), ToolCall(PROBE_NAME, {"key": "1"})]
    for reasoning, content, made in (("Look.", "", calls), ("", "Wait.", calls[:1]), ("Think.\nTwice.", "Done.", [])):
        ids, components = renderer.assistant_turn(reasoning, content, made)
        turn = renderer.parse(ids, [PROBE_TOOL])
        if (turn.reasoning, turn.content, turn.attempts) != (reasoning, content, made):
            raise PactError(
                f"the tool format {type(renderer.format).__name__} does not parse what it renders: {turn.text!r} gives "
                f"{turn.attempts}; choose another model.tool_format"
            )
        if not np.array_equal(turn.components, components):
            raise PactError(
                "with this tokenizer, rendered and sampled tokens get different components; use a byte-level BPE tokenizer"
            )


def _check_texts(renderer: ChatRenderer, turns: Sequence[Turn]) -> list[str]:
    """After every turn, prompt, turns and bridge tokens must decode to the template's rendering of the conversation.

    Templates keep, strip or blank the reasoning of earlier turns. So the turns compared have no reasoning, and empty
    think blocks are ignored. A difference only in blanks beside control tokens is a note: Hermes 2 Pro and 3 write a line
    break after the last tool result only when the conversation continues.
    """
    notes: list[str] = []
    messages = list(_PROMPT)
    for number, (text, calls, following) in enumerate(turns, start=1):
        messages += [call_message(*calls) if calls else {"role": "assistant", "content": text}, *following]
        ours = _comparable(renderer, _text(renderer, _appended(renderer, "", turns[:number])))
        theirs = _comparable(renderer, _rendered(renderer, messages))
        if ours == theirs:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        difference = f"{theirs[at : at + 40]!r} instead of {ours[at : at + 40]!r}"
        if _without_blanks(renderer, ours) != _without_blanks(renderer, theirs):
            raise PactError(
                f"after turn {number} the chat template renders the conversation differently than before (it writes "
                f"{difference}), so turns cannot be appended; set model.chat_template to one that keeps what it has written"
            )
        notes = notes or [
            f"after turn {number} the chat template writes other blanks around earlier turns ({difference}); training "
            "keeps those that it wrote first"
        ]
    return notes


def _check_ids(renderer: ChatRenderer, turns: Sequence[Turn]) -> None:
    """The appended ids must be those that the tokenizer gives the whole text, seams between the parts included."""
    ids = _appended(renderer, "Look.", turns)
    if renderer.tokenizer.encode(_text(renderer, ids), add_special_tokens=False) != ids.tolist():
        raise PactError(
            "appended turns do not have the token ids that the tokenizer gives the whole conversation (it may strip "
            "blanks around special tokens); use a byte-level BPE tokenizer"
        )


def _tool_turns(renderer: ChatRenderer) -> list[Turn]:
    """A trial conversation of calls and results."""
    turns: list[Turn] = []
    for number, texts in enumerate(_RESULTS):
        results = texts if renderer.template.several_calls else texts[:1]
        calls = [ToolCall(PROBE_NAME, {"key": f"k{number}{n}"}) for n, _ in enumerate(results)]
        turns.append(("", calls, [{"role": "tool", "name": PROBE_NAME, "content": text} for text in results]))
    turns[-1][2].append(_AGAIN)
    return turns


def _user_turns(renderer: ChatRenderer) -> list[Turn]:
    """A trial conversation in which the user speaks after answers, before and after calls."""
    called, *_ = _tool_turns(renderer)
    answers: list[Turn] = [
        ("It is him.", [], [_AGAIN]),
        ('Sure:\n{"it": "is"}', [], [{**_AGAIN, "content": "And she?"}]),
    ]
    return [answers[0], called, answers[1], called, answers[0]]


def _appended(renderer: ChatRenderer, reasoning: str, turns: Sequence[Turn]) -> np.ndarray:
    ids = [renderer.prompt_ids(_PROMPT, [PROBE_TOOL])]
    for text, calls, following in turns:
        ids += [renderer.assistant_turn(reasoning, text, calls)[0], renderer.bridge_ids(following)]
    return np.concatenate(ids)


def _rendered(renderer: ChatRenderer, messages: Sequence[Message], generate: bool = True) -> str:
    """The template's own text; with ids, as the text between turns was found."""
    return renderer.template.render(with_call_ids(messages), [PROBE_TOOL], generate=generate)


def _text(renderer: ChatRenderer, ids: np.ndarray) -> str:
    return renderer.token_bytes.join(ids).decode("utf-8", "replace")


def _comparable(renderer: ChatRenderer, text: str) -> str:
    opening, closing = map(re.escape, renderer.format.think)
    return re.sub(rf"{opening}\s*{closing}\s*", "", text)


def _without_blanks(renderer: ChatRenderer, text: str) -> str:
    """The text without blanks beside control tokens."""
    controls = renderer.encoder.all_controls
    return re.sub(rf"\s*({controls.pattern})\s*", r"\1", text) if controls else text
