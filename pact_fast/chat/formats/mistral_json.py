"""Tool calls of Mistral's models up to 2024: a JSON list behind [TOOL_CALLS], with ids."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence

from pact_fast.chat.call_ids import call_id
from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.formats.json_calls import call_json
from pact_fast.chat.formats.json_lists import find_lists
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.data.types import ToolCall, ToolSchema

_MARKER = "[TOOL_CALLS]"
_LIST = re.compile(re.escape(_MARKER).encode())


@tool_format("mistral_json")
class MistralJson(ToolFormat):
    """[TOOL_CALLS] [{"name": …, "arguments": {…}, "id": "call00000"}, …]: all calls of a turn in one list.

    Ids are those of `call_ids`: nine letters or digits, numbered per turn. Some templates write no blank, or no ids.
    """

    markers = (*ToolFormat.markers, _MARKER)
    layout = Layout(before_calls="")
    _gap = " "
    _ids = True

    def variants(self) -> Sequence[ToolFormat]:
        found = []
        for gap, ids in ((" ", True), ("", True), (" ", False), ("", False)):
            one = copy.copy(self)
            one._gap, one._ids = gap, ids
            found.append(one)
        return found

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return _MARKER + self._gap + "[" + ", ".join(self._write(n, call) for n, call in enumerate(calls)) + "]"

    def _write(self, position: int, call: ToolCall) -> str:
        written = call_json(call.to_json(), self.markers)
        return f'{written[:-1]}, "id": {json.dumps(call_id(position))}}}' if self._ids else written

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        return find_lists(data, start, _LIST, tools)
