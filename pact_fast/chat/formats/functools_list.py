"""Tool calls of Phi-4-mini: a JSON list behind the word functools."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.formats.json_calls import call_json
from pact_fast.chat.formats.json_lists import find_lists
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.data.types import ToolCall, ToolSchema

# The word alone, or a Python list behind it, is text of an answer. The text before it may end without a blank.
_LIST = re.compile(rb"functools(?=\s*\[\s*(?:[{\]]|\Z))")


@tool_format("functools")
class Functools(ToolFormat):
    """functools[{"name": …, "arguments": {…}}, …]: all calls of a turn in one list, without a closing marker."""

    layout = Layout(before_calls="")

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "functools[" + ", ".join(call_json(call.to_json(), self.markers) for call in calls) + "]"

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        return find_lists(data, start, _LIST, tools)
