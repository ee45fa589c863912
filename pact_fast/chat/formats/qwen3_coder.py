"""Tool calls with one tag per argument: Qwen3-Coder, Qwen3.5 and later, Nemotron 3."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_fast.chat.chat_template import PROBE_NAME, ChatTemplate
from pact_fast.chat.formats.argument_tags import ArgumentTags
from pact_fast.chat.formats.base import Found, ToolFormat
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.tagged import find_tagged
from pact_fast.chat.formats.typed_values import write_value
from pact_fast.data.types import ToolCall, ToolSchema

_TAGS = ArgumentTags(
    name=re.compile(r"\s*<function=([^<>\n]*)>\s*"),
    opening=re.compile(r"<parameter=([^<>\n]*)>\n?"),
    # A value may hold the closing tag as text: it ends where structure follows.
    closing=re.compile(r"\n?</parameter>\s*(?=<parameter=|</function>)"),
    rest=re.compile(r"</function>\s*\Z"),
    no_name="the call must begin with <function=NAME>",
    unclosed="<parameter={}> is not closed; end every argument with </parameter>",
    expected="<parameter=…> or </function>",
)


@tool_format("qwen3_coder")
class Qwen3Coder(ToolFormat):
    """<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>, each tag on a line of its own.

    Strings are written as they are, other values as JSON. Templates print true, false and null as Python or as JSON does;
    `fit` finds out which.
    """

    markers = (*ToolFormat.markers, "<tool_call>", "</tool_call>")
    end_of_call = "</tool_call>"
    _structure = (*markers, "<function=", "</function>", "<parameter=", "</parameter>")
    _python_words = False

    def fit(self, template: ChatTemplate) -> ToolFormat:
        fitted = super().fit(template)
        call = ToolCall(PROBE_NAME, {"key": True})
        fitted._python_words = ">\nTrue\n<" in template.render_call(call)  # type: ignore[attr-defined]
        return fitted

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(map(self._write, calls))

    def _write(self, call: ToolCall) -> str:
        lines = [f"<tool_call>\n<function={call.name}>"]
        for key, value in call.arguments.items():
            written = write_value(value, self._structure, self._python_words)
            lines.append(f"<parameter={key}>\n{written}\n</parameter>")
        return "\n".join([*lines, "</function>\n</tool_call>"])

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found = find_tagged(data, start, "<tool_call>", "</tool_call>")
        return [(one.start, one.end, one.error or _TAGS.read(one.body, tools)) for one in found]
