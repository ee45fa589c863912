"""Messages of Muse Glimmer: reasoning, calls and answers are messages to the model itself, to a tool and to the user."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_fast.chat.formats.argument_tags import ArgumentTags
from pact_fast.chat.formats.messages import RECIPIENT, Header, MessageFormat
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.typed_values import write_value
from pact_fast.components import Component
from pact_fast.data.types import ToolCall, ToolSchema

_NEXT = "<|eom|><|start|>assistant"  # between two messages of a turn
_MESSAGE = re.compile(
    rb"(?P<header>(?:(?!<\|message\|>|<\|eom\|>|<\|start\|>).)*+)(?:<\|message\|>(?P<body>(?:(?!<\|eom\|>).)*+))?"
    rb"(?:<\|eom\|>\s*(?:<\|start\|>\s*(?:assistant)?)?|<\|start\|>\s*(?:assistant)?)?",
    re.DOTALL,
)
_CALLS = "<atem:function_calls>\n"
_END_CALLS = "\n</atem:function_calls>"
_INVOKE = re.compile(r"\s*(?:<atem:function_calls>\s*)?<atem:invoke")
_TAGS = ArgumentTags(
    name=re.compile(r'\s*name="([^"<>\n]+)"\s*>\s*'),
    opening=re.compile(r'<atem:parameter name="([^"<>\n]*)">'),
    # A value may hold the closing tag as text: it ends where the next argument or the end of the call follows.
    closing=re.compile(r"</atem:parameter>\s*(?=<atem:parameter name=|</atem:invoke>|\Z)"),
    rest=re.compile(r"(?:</atem:invoke>\s*(?:</atem:function_calls>\s*)?)?\Z"),
    no_name='the call must begin with <atem:invoke name="NAME">',
    unclosed="the value of '{}' is not closed; end every value with </atem:parameter>",
    expected='<atem:parameter name="KEY">',
)


@tool_format("atem")
class Atem(MessageFormat):
    """to=self<|message|>reasoning, then to=NAME<|message|>…<atem:invoke name="NAME">… per call, or to=user<|message|>text.

    The generation prompt writes the beginning of the first message, `<|start|>assistant`; messages of a turn are separated
    by <|eom|>. Strings are written as they are, other values as JSON.
    """

    markers = ("<|start|>", "<|message|>", "<|eom|>", "<|eot|>", "<atem:", "</atem:")
    think = (" to=self<|message|>", "<|eom|>")
    message = _MESSAGE

    def pieces(self, reasoning: str, content: str, calls: Sequence[ToolCall]) -> list[tuple[str, Component]]:
        pieces: list[tuple[str, Component]] = []
        if reasoning:
            pieces.append((self.think[0] + self._escape_markers(reasoning) + _NEXT, Component.REASONING))
        if content or not calls:
            text = f" to=user<|message|>{self._escape_markers(content)}"
            pieces.append((text + (_NEXT if calls else ""), Component.ANSWER))
        if calls:
            pieces.append((self.write_calls(calls), Component.TOOL_CALL))
        return pieces

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return _NEXT.join(map(self._write, calls))

    def _write(self, call: ToolCall) -> str:
        written = "".join(
            f'<atem:parameter name="{key}">{write_value(value, self.markers)}</atem:parameter>\n'
            for key, value in call.arguments.items()
        )
        invoke = f'<atem:invoke name="{call.name}">\n{written}</atem:invoke>'
        return f" to={call.name}<|message|>{_CALLS}{invoke}{_END_CALLS}"

    def read_header(self, header: str) -> Header | None:
        recipient = RECIPIENT.search(header)
        if recipient is None:
            return None
        known = {"self": Header(Component.REASONING), "user": Header(Component.ANSWER)}
        return known.get(recipient[1], Header(Component.TOOL_CALL, recipient[1]))

    def read_call(self, name: str, body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError:
            return _TAGS.read(body, tools)
        begin = _INVOKE.match(text)
        return _TAGS.read(text[begin.end() :].encode() if begin else b"", tools)
