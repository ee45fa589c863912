"""Tool calls of DeepSeek V3.1 and later: a name and its arguments between tags, in a section of their own."""

from __future__ import annotations

from collections.abc import Sequence

from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.formats.json_calls import call_json, read_arguments
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.tagged import find_tagged
from pact_fast.data.types import ToolCall, ToolSchema

SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
SEPARATOR = "<｜tool▁sep｜>"


@tool_format("deepseek_v31")
class DeepseekV31(ToolFormat):
    """<｜tool▁calls▁begin｜>, <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜> per call, <｜tool▁calls▁end｜>."""

    markers = (*ToolFormat.markers, *SECTION, *CALL, SEPARATOR)
    end_of_call = SECTION[1]
    layout = Layout("", "", "", "", "", "", "")
    _between = ""

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        written = (f"{CALL[0]}{self._write(call)}{CALL[1]}" for call in calls)
        return SECTION[0] + self._between.join(written) + SECTION[1]

    def _write(self, call: ToolCall) -> str:
        return f"{call.name}{SEPARATOR}{call_json(call.arguments, self.markers)}"

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found = find_tagged(data, start, *CALL, SECTION)
        return [(one.start, one.end, one.error or self._read(one.body, tools)) for one in found]

    def _read(self, body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
        name, separator, arguments = body.partition(SEPARATOR.encode())
        if not separator or not name.strip():
            return f"the call must have the form NAME{SEPARATOR}{{…}}"
        return read_arguments(name.strip().decode("utf-8", "replace"), arguments, tools)
