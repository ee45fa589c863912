"""Messages of Muse Glimmer: reasoning, calls and answers are messages to the model itself, to a tool and to the user."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from pact_fast.chat.chat_template import ChatTemplate
from pact_fast.chat.formats.argument_tags import ArgumentTags
from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS, Found, ParsedTurn, ToolFormat
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.typed_values import write_value
from pact_fast.components import Component
from pact_fast.data.types import ToolCall, ToolSchema

MAX_MESSAGES = 4 * MAX_CALLS  # of a turn; a model that writes more is stuck in a loop, and the rest is one text
_NEXT = "<|eom|><|start|>assistant"  # between two messages of a turn
_MESSAGE = re.compile(
    rb"(?P<header>(?:(?!<\|message\|>|<\|eom\|>|<\|start\|>).)*+)(?:<\|message\|>(?P<body>(?:(?!<\|eom\|>).)*+))?"
    rb"(?:<\|eom\|>\s*(?:<\|start\|>\s*(?:assistant)?)?|<\|start\|>\s*(?:assistant)?)?",
    re.DOTALL,
)
_RECIPIENT = re.compile(r"\bto=(\S+?)(?=\s|<\||$)")
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


class _Message(NamedTuple):
    """Bytes [start, end) of a message, up to the header of the next one; `body` is None without a text."""

    start: int
    end: int
    recipient: str
    body: bytes | None


@tool_format("atem")
class Atem(ToolFormat):
    """to=self<|message|>reasoning, then to=NAME<|message|>…<atem:invoke name="NAME">… per call, or to=user<|message|>text.

    The generation prompt writes the beginning of the first message, `<|start|>assistant`; messages of a turn are separated
    by <|eom|>. Strings are written as they are, other values as JSON.
    """

    markers = ("<|start|>", "<|message|>", "<|eom|>", "<|eot|>", "<atem:", "</atem:")
    think = (" to=self<|message|>", "<|eom|>")
    layout = Layout("", "", "", "", "", "", "")

    def fit(self, template: ChatTemplate) -> ToolFormat:
        return self  # there are no blanks to measure

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

    def parse(self, data: bytes, tools: Sequence[ToolSchema], *, thinking: bool = False) -> ParsedTurn:
        turn = ParsedTurn(data.decode("utf-8", "replace"))
        reasoning: list[str] = []
        content: list[str] = []
        for message in _messages(data):
            component = Component.ANSWER
            text = (message.body or b"").decode("utf-8", "replace").strip()
            if message.recipient not in ("self", "user"):
                component = Component.TOOL_CALL
                turn.attempts.append(_read(message, tools) if len(turn.attempts) < MAX_CALLS else TOO_MANY_CALLS)
            elif message.recipient == "self":
                component = Component.REASONING
                reasoning.append(text)
            elif text:
                content.append(text)
            turn.spans.append((message.start, message.end, component))
            if len(turn.attempts) > MAX_CALLS:
                turn.spans[-1] = (message.start, len(data), component)
                break
        turn.reasoning, turn.content = "\n\n".join(filter(None, reasoning)), "\n".join(content)
        return turn

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        calls = [message for message in _messages(data[start:]) if message.recipient not in ("self", "user")]
        return [(start + one.start, start + one.end, _read(one, tools)) for one in calls[:MAX_CALLS]]


def _messages(data: bytes) -> list[_Message]:
    """The messages of a turn that begins after `<|start|>assistant`, in linear time. Text without a header is an answer."""
    found: list[_Message] = []
    position = 0
    while position < len(data):
        if len(found) == MAX_MESSAGES:
            found.append(_Message(position, len(data), "user", data[position:]))
            break
        match = _MESSAGE.match(data, position)
        if match is None or match.end() == position:
            break
        body = match["body"]
        recipient = _RECIPIENT.search(match["header"].decode("utf-8", "replace"))
        if body is None and not recipient:  # text alone
            body = match["header"]
        found.append(_Message(position, match.end(), recipient[1] if recipient else "user", body))
        position = match.end()
    return found


def _read(message: _Message, tools: Sequence[ToolSchema]) -> ToolCall | str:
    if message.body is None:
        return f"the call of {message.recipient[:60]} has no <|message|> with its arguments"
    try:
        text = message.body.decode("utf-8")
    except UnicodeDecodeError:
        return _TAGS.read(message.body, tools)
    begin = _INVOKE.match(text)
    return _TAGS.read(text[begin.end() :].encode() if begin else b"", tools)
