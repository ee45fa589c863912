"""Messages of gpt-oss: reasoning, calls and answers are messages on channels of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from pact_fast.chat.chat_template import ChatTemplate
from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS, Found, ParsedTurn, ToolFormat
from pact_fast.chat.formats.json_calls import call_json, read_arguments
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.components import Component
from pact_fast.data.types import ToolCall, ToolSchema

MAX_MESSAGES = 4 * MAX_CALLS  # of a turn; a model that writes more is stuck in a loop, and the rest is one text
_NEXT = "<|end|><|start|>assistant"  # between two messages of a turn
_MESSAGE = re.compile(
    rb"(?P<header>(?:(?!<\|message\|>|<\|end\|>|<\|start\|>).)*+)(?:<\|message\|>(?P<body>(?:(?!<\|end\|>|<\|call\|>).)*+))?"
    rb"(?:(?:<\|end\|>|<\|call\|>)\s*(?:<\|start\|>\s*(?:assistant)?)?|<\|start\|>\s*(?:assistant)?)?",
    re.DOTALL,
)
_RECIPIENT = re.compile(r"\bto=(\S+?)(?=\s|<\||$)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class _Message(NamedTuple):
    """Bytes [start, end) of a message, up to the header of the next one; `body` is None without a text."""

    start: int
    end: int
    channel: str
    recipient: str | None
    body: bytes | None


@tool_format("harmony")
class Harmony(ToolFormat):
    """<|channel|>analysis<|message|>…, then to=functions.NAME<|channel|>commentary json<|message|>{…} or a final message.

    The generation prompt writes the beginning of the first message, `<|start|>assistant`. A call ends the turn, so there
    is one call per turn; text before it is a message on the channel `commentary`.
    """

    markers = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
    think = ("<|channel|>analysis<|message|>", "<|end|>")
    layout = Layout("", "", "", "", "", "", "")

    def fit(self, template: ChatTemplate) -> ToolFormat:
        return self  # there are no blanks to measure

    def pieces(self, reasoning: str, content: str, calls: Sequence[ToolCall]) -> list[tuple[str, Component]]:
        pieces: list[tuple[str, Component]] = []
        if reasoning:
            pieces.append((self.think[0] + self._escape_markers(reasoning) + _NEXT, Component.REASONING))
        shown = self._escape_markers(content)
        if calls and content:
            pieces.append((f"<|channel|>commentary<|message|>{shown}{_NEXT}", Component.ANSWER))
        elif not calls:
            pieces.append((f"<|channel|>final<|message|>{shown}", Component.ANSWER))
        if calls:
            pieces.append((self.write_calls(calls), Component.TOOL_CALL))
        return pieces

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return "<|call|><|start|>assistant".join(
            f" to=functions.{call.name}<|channel|>commentary json<|message|>{call_json(call.arguments, self.markers)}"
            for call in calls
        )

    def parse(self, data: bytes, tools: Sequence[ToolSchema], *, thinking: bool = False) -> ParsedTurn:
        turn = ParsedTurn(data.decode("utf-8", "replace"))
        reasoning: list[str] = []
        content: list[str] = []
        for message in _messages(data):
            component = Component.ANSWER
            text = (message.body or b"").decode("utf-8", "replace").strip()
            if message.recipient is not None:
                component = Component.TOOL_CALL
                turn.attempts.append(_read(message, tools) if len(turn.attempts) < MAX_CALLS else TOO_MANY_CALLS)
            elif message.channel == "analysis":
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
        calls = [message for message in _messages(data[start:]) if message.recipient is not None]
        return [(start + one.start, start + one.end, _read(one, tools)) for one in calls[:MAX_CALLS]]


def _messages(data: bytes) -> list[_Message]:
    """The messages of a turn that begins after `<|start|>assistant`, in linear time. Text without a header is a final one."""
    found: list[_Message] = []
    position = 0
    while position < len(data):
        if len(found) == MAX_MESSAGES:
            found.append(_Message(position, len(data), "final", None, data[position:]))
            break
        match = _MESSAGE.match(data, position)
        if match is None or match.end() == position:
            break
        header, body = match["header"].decode("utf-8", "replace"), match["body"]
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        name = channel[1] if channel else "final"
        if body is None and not channel and not recipient:  # text alone
            body = match["header"]
        found.append(_Message(position, match.end(), name, recipient[1] if recipient else None, body))
        position = match.end()
    return found


def _read(message: _Message, tools: Sequence[ToolSchema]) -> ToolCall | str:
    name = (message.recipient or "").removeprefix("functions.")
    if message.body is None:
        return f"the call of {name[:60]} has no <|message|> with its arguments"
    return read_arguments(name, message.body, tools)
