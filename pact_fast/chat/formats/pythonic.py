"""Tool calls of Llama 3.2 and 4 as a Python list, without tags around it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

from pact_fast.chat.formats import python_calls
from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS, Found, ToolFormat
from pact_fast.chat.formats.json_calls import NOT_UTF8
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.typed_values import typed_call, write_value
from pact_fast.chat.tool_schema import declared_types, parameters_of, tool_names
from pact_fast.data.types import ToolCall, ToolSchema

_LIST = re.compile(rb"(?:<\|python_start\|>\s*)?\[\s*(?P<name>[A-Za-z_][\w.\-]*)\s*\(")
_CLOSING = re.compile(rb"\s*<\|python_end\|>\s*\Z")
_ENDS_EARLY = re.compile(r'"\s*(?:[,:)\]}]|\Z)|\\')  # in a text between double quotes


@tool_format("pythonic")
class Pythonic(ToolFormat):
    """[f(x=1, y="text"), g()]: all calls of a turn in one list, at its end.

    A list is an attempt at calls if it begins the turn, or names a known tool; any other is text of the answer. Some
    templates (Llama 4's of vLLM) write every value between double quotes and escape nothing; a value is then read by the
    type that the tool declares.
    """

    markers = (*ToolFormat.markers, "<|python_start|>", "<|python_end|>")
    layout = Layout(before_calls="", before_turn="")
    _all_quoted = False

    def variants(self) -> Sequence[ToolFormat]:
        quoted = copy.copy(self)
        quoted._all_quoted = True
        return [self, quoted]

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "[" + ", ".join(f"{call.name}({self._arguments(call)})" for call in calls) + "]"

    def _arguments(self, call: ToolCall) -> str:
        return ", ".join(f"{key}={self._value(value)}" for key, value in call.arguments.items())

    def _value(self, value: Any) -> str:
        if not self._all_quoted:
            return python_calls.printed_value(value, self.markers)
        text = value if isinstance(value, str) else python_calls.printed_value(value, self.markers)
        text = write_value(text, self.markers)
        if _ENDS_EARLY.search(text):  # it could not be read back
            text = text.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{text}"'

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        names = {name.encode() for name in tool_names(tools)}
        first = start + len(data[start:]) - len(data[start:].lstrip())
        for opening in _LIST.finditer(data, start):
            if opening.start() == first or opening["name"] in names:
                return self._read(data, opening.start(), data.index(b"[", opening.start()), tools)
        return []

    def _read(self, data: bytes, begin: int, at: int, tools: Sequence[ToolSchema]) -> list[Found]:
        closing = _CLOSING.search(data, at)
        try:
            text = data[at : closing.start() if closing else len(data)].decode("utf-8")
        except UnicodeDecodeError:
            return [(begin, len(data), NOT_UTF8)]
        found: list[Found] = []
        done = 0
        for place, attempt in python_calls.read_calls(text, tools, MAX_CALLS + 1, self._typed):
            at += len(text[done:place].encode("utf-8"))
            if at == begin and found:  # the list breaks off behind a comma, which is the next call's
                begin -= 1
                found[-1] = (found[-1][0], begin, found[-1][2])
            found.append((begin, at, TOO_MANY_CALLS if len(found) == MAX_CALLS else attempt))
            done, begin = place, at
        found[-1] = (found[-1][0], len(data), found[-1][2])
        return found

    def _typed(self, call: ToolCall, tools: Sequence[ToolSchema]) -> ToolCall | str:
        """The call, with arguments of the types that the tool declares where all of them are written as text."""
        as_written = python_calls.checked(call, tools)
        if not all(isinstance(value, str) for value in call.arguments.values()):
            return as_written
        if not self._all_quoted and isinstance(as_written, ToolCall):
            return as_written
        schemas = parameters_of(call.name, tools)
        texts = [(key, _as_json(text, schemas.get(key))) for key, text in call.arguments.items()]
        return typed_call(call.name, texts, tools)


def _as_json(text: str, schema: Any) -> str:
    """A list or an object that Python has printed, as JSON, unless the argument may be a string."""
    if text[:1] not in ("[", "{") or str in declared_types(schema if isinstance(schema, dict) else {}):
        return text
    try:
        return json.dumps(python_calls.read_value(text), ensure_ascii=False)
    except (ValueError, RecursionError, OverflowError):
        return text
