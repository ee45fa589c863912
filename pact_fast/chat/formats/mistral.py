"""Tool calls of Mistral's models since 2025: a name and its arguments behind markers of their own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS, Found, ToolFormat
from pact_fast.chat.formats.json_calls import call_json, json_end, read_arguments
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.data.types import ToolCall, ToolSchema

_MARKER, _ARGS = "[TOOL_CALLS]", "[ARGS]"
_CALL = re.compile(rb"\[TOOL_CALLS\]")
# Some models were trained on an id behind the name, or on nothing between name and arguments.
_NAME = re.compile(rb"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\]\s*[^\s\[\]{}]+\s*)?(?:\[ARGS\]\s*|(?=\{))")


@tool_format("mistral")
class Mistral(ToolFormat):
    """[TOOL_CALLS]NAME[ARGS]{…}, one behind the other. Reasoning is [THINK]…[/THINK]."""

    think = ("[THINK]", "[/THINK]")
    markers = (*think, _MARKER, "[CALL_ID]", _ARGS)
    layout = Layout("", "", "", "", "", "", "")

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "".join(f"{_MARKER}{call.name}{_ARGS}{call_json(call.arguments, self.markers)}" for call in calls)

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        starts = [one.start() for one in _CALL.finditer(data, start)]
        found: list[Found] = []
        for begin, end in itertools.pairwise([*starts, len(data)]):
            if len(found) == MAX_CALLS:
                return [*found, (begin, len(data), TOO_MANY_CALLS)]
            body = data[begin + len(_MARKER) : end]
            attempt, length = _read(body, tools)
            found.append((begin, end - len(body) + length, attempt))
        return found


def _read(body: bytes, tools: Sequence[ToolSchema]) -> tuple[ToolCall | str, int]:
    """Parse the text after a marker: (call or error, its length). Text after the call belongs to no call."""
    name = _NAME.match(body)
    if not name:
        return f"the call must have the form {_MARKER}NAME{_ARGS}{{…}}", len(body)
    end = json_end(body.decode("latin-1"), name.end()) or len(body)
    return read_arguments(name[1].decode("utf-8", "replace"), body[name.end() : end], tools), end
