"""Tool calls between <tool_call> tags: Qwen2.5 and 3, Hermes, and many others."""

from __future__ import annotations

from collections.abc import Sequence

from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.formats.json_calls import call_json, read_call
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.tagged import find_tagged
from pact_fast.data.types import ToolCall, ToolSchema


@tool_format("hermes")
class Hermes(ToolFormat):
    """<tool_call>{"name": …, "arguments": …}</tool_call>, one per line."""

    markers = (*ToolFormat.markers, "<tool_call>", "</tool_call>")
    end_of_call = "</tool_call>"

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"<tool_call>\n{call_json(call.to_json(), self.markers)}\n</tool_call>" for call in calls)

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found = find_tagged(data, start, "<tool_call>", "</tool_call>")
        return [(one.start, one.end, one.error or read_call(one.body, tools, "arguments")) for one in found]
