"""Tool calls of Kimi K2: an id that holds the tool's name, and arguments as JSON, in a section of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_fast.chat.call_ids import named_call_id
from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.formats.json_calls import call_json, read_arguments
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.tagged import find_tagged
from pact_fast.data.types import ToolCall, ToolSchema

_SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_CALL = ("<|tool_call_begin|>", "<|tool_call_end|>")
_SEPARATOR = "<|tool_call_argument_begin|>"
_ID = re.compile(r"\s*(?:functions\.)?(\S+?)(?::\d+)?\s*")


@tool_format("kimi_k2")
class KimiK2(ToolFormat):
    """<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}<|tool_call_end|> per call, in a section.

    The number counts the calls of the turn. A model may write another one, which is not compared.
    """

    markers = (*ToolFormat.markers, *_SECTION, *_CALL, _SEPARATOR)
    end_of_call = _SECTION[1]
    layout = Layout("", "", "", "", "", "", "")

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        written = (
            f"{_CALL[0]}{named_call_id(call.name, n)}{_SEPARATOR}{call_json(call.arguments, self.markers)}{_CALL[1]}"
            for n, call in enumerate(calls)
        )
        return _SECTION[0] + "".join(written) + _SECTION[1]

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found = find_tagged(data, start, *_CALL, _SECTION)
        return [(one.start, one.end, one.error or _read(one.body, tools)) for one in found]


def _read(body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
    written, separator, arguments = body.partition(_SEPARATOR.encode())
    name = _ID.fullmatch(written.decode("utf-8", "replace"))
    if not separator or not name:
        return f"the call must have the form functions.NAME:0{_SEPARATOR}{{…}}"
    return read_arguments(name[1], arguments, tools)
