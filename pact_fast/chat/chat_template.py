"""Renders a tokenizer's chat template, and finds its end of turn and the text between turns by rendering probes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from pact_fast.data.types import Message, ToolCall, ToolSchema, text_of
from pact_fast.errors import PactError

QUESTION: Message = {"role": "user", "content": "Go on."}
_MARKER = "Zq0Zmark"  # a word that no template contains or changes
# How templates transform the content of a message. Llama writes tool results as JSON strings, others strip them.
_TRANSFORMS: tuple[Callable[[str], str], ...] = (str, str.strip, lambda text: json.dumps(text, ensure_ascii=False))
_PROBES = ("  two spaces\n", 'say "hi" \\ {"a": [1]}\nnext', "<b>é</b> & 中 {{ x }} 'q'", "7")

Pattern = tuple[tuple[str, str], ...]  # (role, name of the tool) of consecutive messages


class ChatTemplate:
    """Renders messages to text with the tokenizer's template. PactError if it has none or the template fails."""

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise PactError(
                "the tokenizer has no chat template; name a Jinja file in model.chat_template, or chatml_hermes for a model "
                "of ChatML"
            )
        self._tokenizer = tokenizer
        self.skeleton = functools.lru_cache(maxsize=4096)(self._skeleton)
        self._transform_of = functools.cache(self._find_transform)

    def render(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] = (), *, generate: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation; with `generate`, followed by the generation prompt."""
        try:
            return self._tokenizer.apply_chat_template(
                [{**m, "content": text_of(m.get("content"))} for m in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=generate,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise PactError(
                f"the chat template cannot render a conversation of {roles}: {' '.join(str(error).split())[:200]}; set "
                "model.chat_template to one that can"
            ) from None

    def render_call(self, call: ToolCall) -> str:
        """The text of a conversation with one tool call."""
        return self.render([QUESTION, call_message(call)])

    @functools.cached_property
    def after_turn(self) -> str:
        """The text that the template writes after an assistant turn; starts with the end-of-turn token."""
        text = self.render([QUESTION, {"role": "assistant", "content": _MARKER}])
        if text.count(_MARKER) != 1:
            raise PactError(
                "the chat template does not show the assistant's text; set model.chat_template to one that does"
            )
        return text.split(_MARKER)[1]

    @functools.cached_property
    def generation_prompt(self) -> str:
        """The text that the template writes for `add_generation_prompt`."""
        shown, asked = self.render([QUESTION]), self.render([QUESTION], generate=True)
        if not asked.startswith(shown) or asked == shown:
            raise PactError(
                "the chat template has no generation prompt (add_generation_prompt changes nothing); set "
                "model.chat_template to one that has"
            )
        return asked[len(shown) :]

    def bridge_tokens(self, messages: Sequence[Message], eot: str) -> tuple[tuple[str, ...], list[str]]:
        """(n + 1 texts of the template, n contents): interleaved, the text after the end-of-turn token `eot`."""
        pattern = tuple((m["role"], m.get("name") or "") for m in messages)
        contents = [self._transform_of(m["role"], eot)(text_of(m.get("content"))) for m in messages]
        return self.skeleton(pattern, eot), contents

    def _skeleton(self, pattern: Pattern, eot: str) -> tuple[str, ...]:
        """The template's text around the contents of the messages, checked by a second rendering."""
        marks = [f"{_MARKER}{i}x" for i in range(len(pattern))]
        transforms = [self._transform_of(role, eot) for role, _ in pattern]
        pieces = _split(
            self._after(pattern, marks, eot), [transform(m) for transform, m in zip(transforms, marks, strict=True)]
        )
        probes = [_PROBES[i % len(_PROBES)] for i in range(len(pattern))]
        transformed = [transform(probe) for transform, probe in zip(transforms, probes, strict=True)]
        if pieces is None or _join(pieces, transformed) != self._after(pattern, probes, eot):
            roles = ", ".join(role for role, _ in pattern)
            raise PactError(
                f"the chat template renders the messages ({roles}) differently depending on their contents, so "
                "turns cannot be appended; set model.chat_template to one that does not"
            )
        return pieces

    def _find_transform(self, role: str, eot: str) -> Callable[[str], str]:
        """How the template transforms the content of a message of this role."""
        pattern = ((role, "f" if role == "tool" else ""),)
        shown = self._after(pattern, [_MARKER + "0x"], eot)
        for transform in _TRANSFORMS:
            pieces = _split(shown, [transform(_MARKER + "0x")])
            if pieces and all(_join(pieces, [transform(p)]) == self._after(pattern, [p], eot) for p in _PROBES):
                return transform
        raise PactError(
            f"the chat template does not show the content of a '{role}' message as it is; set model.chat_template to "
            "one that does"
        )

    def _after(self, pattern: Pattern, contents: Sequence[str], eot: str) -> str:
        """The template's text from the end of an assistant turn, followed by these messages, to the generation prompt."""
        messages: list[Message] = []
        for (role, name), content in zip(pattern, contents, strict=True):
            messages.append({"role": role, "content": content, **({"name": name} if name else {})})
        turn: Message = {"role": "assistant", "content": _MARKER}
        if pattern[0][0] == "tool":
            turn = call_message(ToolCall("f", {"x": _MARKER}))
        text = self.render([QUESTION, turn, *messages], generate=True)
        start = text.find(_MARKER)
        end = text.find(eot, start)
        if start < 0 or end < 0:
            raise PactError(
                f"the chat template does not end an assistant turn with {eot!r} before a '{pattern[0][0]}' message; "
                "set model.chat_template to one that does"
            )
        return text[end + len(eot) :]


def call_message(call: ToolCall) -> Message:
    """An assistant message with one tool call."""
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call.to_json()}]}


def _split(text: str, contents: Sequence[str]) -> tuple[str, ...] | None:
    """The pieces of text around the contents, which occur in this order; None if one is missing."""
    pieces: list[str] = []
    for content in contents:
        piece, found, text = text.partition(content)
        if not found:
            return None
        pieces.append(piece)
    return (*pieces, text)


def _join(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))
