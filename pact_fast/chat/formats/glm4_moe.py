"""Tool calls of GLM-4.5 and later: keys and values between tags of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_fast.chat.formats.argument_tags import ArgumentTags
from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.tagged import find_tagged
from pact_fast.chat.formats.typed_values import write_value
from pact_fast.data.types import ToolCall, ToolSchema

_TAGS = ArgumentTags(
    name=re.compile(r"\s*([^\s<]+)\s*"),
    opening=re.compile(r"<arg_key>([^<]*)</arg_key>\s*<arg_value>"),
    # A value may hold the closing tag as text: it ends where the next argument or the end of the call follows.
    closing=re.compile(r"</arg_value>\s*(?=<arg_key>|\Z)"),
    rest=re.compile(r"\Z"),
    no_name="the call must begin with the name of the tool",
    unclosed="the value of '{}' is not closed; end every value with </arg_value>",
    expected="<arg_key>KEY</arg_key> and <arg_value>",
)


@tool_format("glm4_moe")
class Glm4Moe(ToolFormat):
    """<tool_call>NAME, then a line <arg_key>KEY</arg_key> and a line <arg_value>VALUE</arg_value> per argument.

    Strings are written as they are, other values as JSON.
    """

    markers = (
        *ToolFormat.markers, "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    )  # fmt: skip
    end_of_call = "</tool_call>"
    layout = Layout("\n", "", "", "\n", "\n", "\n", "")

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(map(self._write, calls))

    def _write(self, call: ToolCall) -> str:
        lines = [f"<tool_call>{call.name}"]
        for key, value in call.arguments.items():
            lines += [f"<arg_key>{key}</arg_key>", f"<arg_value>{write_value(value, self.markers)}</arg_value>"]
        return "\n".join([*lines, "</tool_call>"])

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found = find_tagged(data, start, "<tool_call>", "</tool_call>")
        return [(one.start, one.end, one.error or _TAGS.read(one.body, tools)) for one in found]
