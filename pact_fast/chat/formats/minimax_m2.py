"""Tool calls of MiniMax M2: one tag per argument, all calls of a turn in one section."""

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

_SECTION = ("<minimax:tool_call>", "</minimax:tool_call>")
_TAGS = ArgumentTags(
    name=re.compile(r'\s*name="([^"<>\n]+)"\s*>\s*'),
    opening=re.compile(r'<parameter name="([^"<>\n]*)">'),
    # A value may hold the closing tag as text: it ends where the next argument or the end of the call follows.
    closing=re.compile(r"</parameter>\s*(?=<parameter name=|\Z)"),
    rest=re.compile(r"\Z"),
    no_name='the call must begin with <invoke name="NAME">',
    unclosed="the value of '{}' is not closed; end every value with </parameter>",
    expected='<parameter name="KEY">',
)


@tool_format("minimax_m2")
class MinimaxM2(ToolFormat):
    """<minimax:tool_call>, a line <invoke name="NAME">, <parameter name="KEY">VALUE</parameter> and </invoke> per call.

    Strings are written as they are, other values as JSON.
    """

    markers = (*ToolFormat.markers, *_SECTION, "<invoke", "</invoke>")
    end_of_call = _SECTION[1]
    layout = Layout(after_reasoning="\n\n", reasoning_calls="\n\n", before_calls="\n")
    _structure = (*markers, "<parameter", "</parameter>")

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join([_SECTION[0], *map(self._write, calls), _SECTION[1]])

    def _write(self, call: ToolCall) -> str:
        lines = [f'<invoke name="{call.name}">']
        for key, value in call.arguments.items():
            lines.append(f'<parameter name="{key}">{write_value(value, self._structure)}</parameter>')
        return "\n".join([*lines, "</invoke>"])

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found = find_tagged(data, start, "<invoke", "</invoke>", _SECTION)
        return [(one.start, one.end, one.error or _TAGS.read(one.body, tools)) for one in found]
