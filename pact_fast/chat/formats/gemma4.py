"""Tool calls in Gemma 4's notation: like JSON, with strings between <|"|> and keys without quotes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pact_fast.chat.chat_template import PROBE_NAME, ChatTemplate
from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.formats.json_calls import MAX_DEPTH, NOT_UTF8, TOO_DEEP, parse_scalar
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.tagged import find_tagged
from pact_fast.chat.tool_schema import call_error
from pact_fast.data.types import ToolCall, ToolSchema

QUOTE = '<|"|>'
_NAME = re.compile(r"\s*call:([^{\s]+)\s*(?=\{)")
_KEY = re.compile(r'\s*(?:<\|"\|>((?:(?!<\|"\|>).)*)<\|"\|>|([^\s:,{}\[\]<>"]+))\s*:', re.DOTALL)
_SCALAR = re.compile(r"[^\s,{}\[\]<]{1,400}")
_BLANKS = re.compile(r"\s*")
_WORDS = {"None": None, "True": True, "False": False}


@tool_format("gemma4")
class Gemma4(ToolFormat):
    """<|tool_call>call:NAME{key:<|"|>text<|"|>,n:1}<tool_call|>; keys are sorted. Reasoning is <|channel>thought … <channel|>.

    Some templates write null as None; `fit` finds out which.
    """

    markers = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", QUOTE)
    end_of_call = "<tool_call|>"
    think = ("<|channel>thought", "<channel|>")
    layout = Layout(after_reasoning="", reasoning_calls="", before_calls="")
    _null = "null"

    def fit(self, template: ChatTemplate) -> ToolFormat:
        fitted = super().fit(template)
        if ":None}" in template.render_call(ToolCall(PROBE_NAME, {"key": None})):
            fitted._null = "None"  # type: ignore[attr-defined]
        return fitted

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "".join(f"<|tool_call>call:{call.name}{self._write(call.arguments)}<tool_call|>" for call in calls)

    def _write(self, value: Any) -> str:
        if isinstance(value, str):
            return QUOTE + self._escape_markers(value) + QUOTE
        if isinstance(value, dict):
            # the order of Jinja's dictsort, which ignores case
            items = sorted(value.items(), key=lambda item: item[0].lower())
            return "{" + ",".join(f"{self._key(key)}:{self._write(item)}" for key, item in items) + "}"
        if isinstance(value, list | tuple):
            return "[" + ",".join(map(self._write, value)) + "]"
        if isinstance(value, bool):
            return "true" if value else "false"
        return self._null if value is None else str(value)

    def _key(self, key: str) -> str:
        found = _KEY.fullmatch(key + ":")
        return key if found and found[2] == key else QUOTE + self._escape_markers(key) + QUOTE

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found = find_tagged(data, start, "<|tool_call>", "<tool_call|>")
        return [(one.start, one.end, one.error or _read(one.body, tools)) for one in found]


def _read(body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
    try:
        text = body.decode("utf-8")
        name = _NAME.match(text)
        if not name:
            return "the call must have the form call:NAME{key:value}"
        value, end = _value(text, name.end(), MAX_DEPTH)
    except UnicodeDecodeError:
        return NOT_UTF8
    except RecursionError:
        return TOO_DEEP
    except ValueError as error:
        return f"the call is not valid: {error}"
    if text[end:].strip():
        return f"unexpected text after the call: {text[end:].strip()[:40]!r}"
    call = ToolCall(name[1], value)
    return call_error(call, tools) or call


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """(value, its end) at a place of the text. ValueError with the reason; RecursionError if nested deeper than `depth`."""
    if text.startswith(QUOTE, at):
        end = text.find(QUOTE, at + len(QUOTE))
        if end < 0:
            raise ValueError(f"a string is not closed; end every string with {QUOTE}")
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text[at : at + 1] in ("{", "["):
        if depth == 0:
            raise RecursionError
        return _object(text, at + 1, depth - 1) if text[at] == "{" else _list(text, at + 1, depth - 1)
    scalar = _SCALAR.match(text, at)
    if not scalar:
        raise ValueError(f"expected a value at {text[at : at + 40]!r}")
    if scalar.group() in _WORDS:
        return _WORDS[scalar.group()], scalar.end()
    try:
        return parse_scalar(scalar.group()), scalar.end()
    except ValueError:
        raise ValueError(f"{scalar.group()[:40]!r} is no value; write strings as {QUOTE}text{QUOTE}") from None


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    value: dict[str, Any] = {}
    while True:
        at = _skip(text, at)
        if text.startswith("}", at) and not value:
            return value, at + 1
        key = _KEY.match(text, at)
        if not key:
            raise ValueError(f"expected key:value at {text[at : at + 40]!r}")
        name = key[1] if key[1] is not None else key[2]
        value[name], at = _value(text, _skip(text, key.end()), depth)
        at, done = _next(text, at, "}")
        if done:
            return value, at


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    value: list[Any] = []
    while True:
        at = _skip(text, at)
        if text.startswith("]", at) and not value:
            return value, at + 1
        item, at = _value(text, at, depth)
        value.append(item)
        at, done = _next(text, at, "]")
        if done:
            return value, at


def _next(text: str, at: int, closing: str) -> tuple[int, bool]:
    """(place after the comma or the closing bracket, whether it was the bracket)."""
    at = _skip(text, at)
    if text[at : at + 1] not in (",", closing) or at >= len(text):
        raise ValueError(f"expected ',' or {closing!r} at {text[at : at + 40]!r}")
    return at + 1, text[at] == closing


def _skip(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at
