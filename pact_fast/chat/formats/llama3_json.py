"""Tool calls as bare JSON objects: Llama 3.1 and later."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS, Found, ToolFormat
from pact_fast.chat.formats.json_calls import call_json, read_call
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.tool_schema import tool_names
from pact_fast.data.types import ToolCall, ToolSchema

_DECODER = json.JSONDecoder()


@tool_format("llama3_json")
class Llama3Json(ToolFormat):
    """{"name": …, "parameters": …}, several joined by "; "; Llama 3.1 and later.

    The format has no markers. JSON is an attempt if it has the shape of a call: "parameters" or "arguments", or the
    name of a known tool. Malformed JSON is an attempt only where a call is expected: at the start of the turn, after
    another call, or after <|python_tag|>. Any other JSON is text of the answer.
    """

    _opening = re.compile(rb'(?:<\|python_tag\|>\s*)?\{\s*"(?:name|type|function)"\s*:|<\|python_tag\|>')

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "; ".join(call_json({"name": call.name, "parameters": call.arguments}, self.markers) for call in calls)

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found: list[Found] = []
        text = data.decode("latin-1")  # JSON's structure is ASCII, and each byte is one character
        names = tool_names(tools)
        free, expected = start, _skip(data, start)  # end of the parsed text; where the next call would begin
        position = start
        for _ in range(4 * MAX_CALLS):  # bounds the time on text full of call-like JSON
            opening = self._opening.search(data, position)
            if not opening:
                break
            begin, brace = opening.start(), data.find(b"{", opening.start(), opening.end())
            first = free if found and begin == expected else begin  # a separator belongs to the call after it
            if len(found) == MAX_CALLS:
                found.append((first, len(data), TOO_MANY_CALLS))
                break
            value, position = _scan_json(text, brace) if brace >= 0 else (None, opening.end())
            if _call_shaped(value, names):
                found.append((first, position, read_call(data[brace:position], tools, "parameters")))
                free, expected = position, _skip(data, position)
            elif value is None and (begin == expected or brace != begin):
                found.append((first, len(data), read_call(data[max(brace, begin) :], tools, "parameters")))
                break
        return found


def _scan_json(text: str, start: int) -> tuple[Any, int]:
    """(value, its end) of the JSON at `start`; (None, start + 1) if it is malformed."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start + 1


def _call_shaped(value: Any, names: Collection[str]) -> bool:
    if not isinstance(value, dict):
        return False
    if "name" not in value and isinstance(value.get("function"), dict):
        value = value["function"]
    return "name" in value and ("parameters" in value or "arguments" in value or value["name"] in names)


def _skip(data: bytes, position: int) -> int:
    """The next position that is no separator or whitespace."""
    blank = re.compile(rb"[;,\s]*").match(data, position)
    return blank.end() if blank else position
