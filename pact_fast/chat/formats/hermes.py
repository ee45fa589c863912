"""Tool calls between <tool_call> tags: Qwen2.5 and 3, Hermes, and many others."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS, Found, ToolFormat
from pact_fast.chat.formats.json_calls import call_json, read_call
from pact_fast.chat.formats.registry import tool_format
from pact_fast.data.types import ToolCall, ToolSchema


@tool_format("hermes")
class Hermes(ToolFormat):
    """<tool_call>{"name": …, "arguments": …}</tool_call>, one per line."""

    markers = (*ToolFormat.markers, "<tool_call>", "</tool_call>")
    end_of_call = "</tool_call>"

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"<tool_call>\n{call_json(call.to_json(), self.markers)}\n</tool_call>" for call in calls)

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found: list[Found] = []
        opened: re.Match[bytes] | None = None
        for tag in re.compile(rb"</?tool_call>").finditer(data, start):
            if len(found) >= MAX_CALLS:
                found.append(((opened or tag).start(), len(data), TOO_MANY_CALLS))
                return found
            if tag.group() == b"<tool_call>":
                if opened:
                    found.append((opened.start(), tag.start(), "<tool_call> is not closed before the next <tool_call>"))
                opened = tag
            elif opened:
                found.append(
                    (opened.start(), tag.end(), read_call(data[opened.end() : tag.start()], tools, "arguments"))
                )
                opened = None
            else:
                found.append((tag.start(), tag.end(), "</tool_call> without <tool_call>"))
        if opened:
            found.append((opened.start(), len(data), "<tool_call> is not closed; end every call with </tool_call>"))
        return found
