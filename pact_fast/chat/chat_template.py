"""A tokenizer's chat template, asked for what append-only rendering needs: its end of turn, and what follows a turn."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from pact_fast.data.types import Message, ToolCall, ToolSchema, text_of
from pact_fast.errors import PactError

QUESTION: Message = {"role": "user", "content": "Go on."}
_MARK = "Zq0Zmark"  # a word that no template contains or changes
# What templates do to the content of a message. Llama writes tool results as JSON strings, others strip them.
_CHANGES: tuple[Callable[[str], str], ...] = (str, str.strip, lambda text: json.dumps(text, ensure_ascii=False))
_PROBES = ("  two spaces\n", 'say "hi" \\ {"a": [1]}\nnext', "<b>é</b> & 中 {{ x }} 'q'", "7")

Pattern = tuple[tuple[str, str], ...]  # (role, name of the tool) of consecutive messages


class ChatTemplate:
    """Renders messages to text through the tokenizer's template. PactError if it has none or the template refuses."""

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise PactError("the tokenizer has no chat template; name a Jinja file in model.chat_template")
        self._tokenizer = tokenizer
        self.skeleton = functools.lru_cache(maxsize=4096)(self._skeleton)
        self._change_of = functools.cache(self._find_change)

    def text(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] = (), *, generate: bool = False, **variables: Any
    ) -> str:
        """The rendered conversation; with `generate`, up to where the assistant is to speak."""
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

    def with_call(self, call: ToolCall) -> str:
        """A conversation that holds a tool call."""
        return self.text([QUESTION, calling(call)])

    @functools.cached_property
    def after_turn(self) -> str:
        """What the template writes after the text of an assistant turn; starts with the end-of-turn token."""
        text = self.text([QUESTION, {"role": "assistant", "content": _MARK}])
        if text.count(_MARK) != 1:
            raise PactError(
                "the chat template does not show what the assistant said; set model.chat_template to one that does"
            )
        return text.split(_MARK)[1]

    @functools.cached_property
    def generation_prompt(self) -> str:
        """What the template writes to make the assistant speak."""
        shown, asked = self.text([QUESTION]), self.text([QUESTION], generate=True)
        if not asked.startswith(shown) or asked == shown:
            raise PactError(
                "the chat template has no generation prompt (add_generation_prompt changes nothing); set "
                "model.chat_template to one that has"
            )
        return asked[len(shown) :]

    def bridge_tokens(self, messages: Sequence[Message], eot: str) -> tuple[tuple[str, ...], list[str]]:
        """(n + 1 template texts, n contents) that interleave to what follows the end-of-turn token `eot`."""
        pattern = tuple((m["role"], m.get("name") or "") for m in messages)
        contents = [self._change_of(m["role"], eot)(text_of(m.get("content"))) for m in messages]
        return self.skeleton(pattern, eot), contents

    def _skeleton(self, pattern: Pattern, eot: str) -> tuple[str, ...]:
        """The template's own text around the contents of the messages; checked against a second rendering."""
        marks = [f"{_MARK}{i}x" for i in range(len(pattern))]
        changes = [self._change_of(role, eot) for role, _ in pattern]
        pieces = _split(self._after(pattern, marks, eot), [change(m) for change, m in zip(changes, marks, strict=True)])
        probes = [_PROBES[i % len(_PROBES)] for i in range(len(pattern))]
        changed = [change(probe) for change, probe in zip(changes, probes, strict=True)]
        if pieces is None or _join(pieces, changed) != self._after(pattern, probes, eot):
            roles = ", ".join(role for role, _ in pattern)
            raise PactError(
                f"the chat template renders the messages ({roles}) differently depending on what they contain, so "
                "turns cannot be appended; set model.chat_template to one that does not"
            )
        return pieces

    def _find_change(self, role: str, eot: str) -> Callable[[str], str]:
        """What the template does to the content of a message of this role."""
        pattern = ((role, "f" if role == "tool" else ""),)
        shown = self._after(pattern, [_MARK + "0x"], eot)
        for change in _CHANGES:
            pieces = _split(shown, [change(_MARK + "0x")])
            if pieces and all(_join(pieces, [change(p)]) == self._after(pattern, [p], eot) for p in _PROBES):
                return change
        raise PactError(
            f"the chat template does not show the content of a '{role}' message as it is; set model.chat_template to "
            "one that does"
        )

    def _after(self, pattern: Pattern, contents: Sequence[str], eot: str) -> str:
        """What the template itself writes after the end of an assistant turn that these messages follow."""
        messages: list[Message] = []
        for (role, name), content in zip(pattern, contents, strict=True):
            messages.append({"role": role, "content": content, **({"name": name} if name else {})})
        spoken: Message = {"role": "assistant", "content": _MARK}
        if pattern[0][0] == "tool":
            spoken = calling(ToolCall("f", {"x": _MARK}))
        text = self.text([QUESTION, spoken, *messages], generate=True)
        start = text.find(_MARK)
        end = text.find(eot, start)
        if start < 0 or end < 0:
            raise PactError(
                f"the chat template does not end an assistant turn with {eot!r} before a '{pattern[0][0]}' message; "
                "set model.chat_template to one that does"
            )
        return text[end + len(eot) :]


def calling(call: ToolCall) -> Message:
    """An assistant message with one tool call."""
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call.to_json()}]}


def _split(text: str, contents: Sequence[str]) -> tuple[str, ...] | None:
    """The pieces of text around the contents, in order; None if one is not found."""
    pieces: list[str] = []
    for content in contents:
        piece, found, text = text.partition(content)
        if not found:
            return None
        pieces.append(piece)
    return (*pieces, text)


def _join(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))
