"""A tool-call format in one file: <call name="f">{"x": 1}</call>.

    pact-fast doctor quickstart model.tool_format=examples/own_tool_format.py:XmlCalls

`doctor` will say that the chat template of the quickstart does not write calls like this: a format goes with a chat
template (`model.chat_template`). A format writes the calls of an assistant turn and finds those of a turn that a model
wrote; a malformed call becomes an error text, which the model reads as the observation. It never raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.tool_schema import call_error
from pact_fast.data.types import ToolCall, ToolSchema

CALL = re.compile(rb'<call name="([^"]*)">(.*?)(?:</call>|\Z)', re.DOTALL)


class XmlCalls(ToolFormat):
    """Calls as XML elements with JSON arguments."""

    markers = (*ToolFormat.markers, "<call ", "</call>")
    end_of_call = "</call>"

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(
            f'<call name="{call.name}">{json.dumps(call.arguments).replace("<", chr(92) + "u003c")}</call>'
            for call in calls
        )

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        return [(m.start(), m.end(), _read(m[1], m[2], tools)) for m in CALL.finditer(data, start)]


def _read(name: bytes, body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
    try:
        arguments = json.loads(body)
    except (ValueError, RecursionError) as error:
        return f"the arguments are not valid JSON: {error}"
    if not isinstance(arguments, dict):
        return "the arguments must be a JSON object"
    call = ToolCall(name.decode("utf-8", "replace"), arguments)
    return call_error(call, tools) or call
