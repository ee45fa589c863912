"""Tool calls of Granite 3 and of Phi-4-mini: a JSON list behind a tag."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.formats.json_calls import call_json
from pact_fast.chat.formats.json_lists import find_lists
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.data.types import ToolCall, ToolSchema

_OPENING, _CLOSING = "<|tool_call|>", "<|/tool_call|>"
_LIST = re.compile(re.escape(_OPENING).encode())


@tool_format("granite")
class Granite(ToolFormat):
    """<|tool_call|>[{"name": …, "arguments": {…}}, …]: all calls of a turn in one list.

    Some templates write a blank behind the tag, or a closing tag (Phi-4-mini's).
    """

    markers = (*ToolFormat.markers, _OPENING, _CLOSING)
    layout = Layout(before_calls="")
    _gap = ""
    _closed = False

    def variants(self) -> Sequence[ToolFormat]:
        found = []
        for gap, closed in (("", True), (" ", True), ("", False), (" ", False)):  # the longer text first
            one = copy.copy(self)
            one._gap, one._closed = gap, closed
            found.append(one)
        return found

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        written = ", ".join(call_json(call.to_json(), self.markers) for call in calls)
        return f"{_OPENING}{self._gap}[{written}]{_CLOSING if self._closed else ''}"

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        return find_lists(data, start, _LIST, tools, _CLOSING.encode())
