"""Messages of gpt-oss: reasoning, calls and answers are messages on channels of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_fast.chat.formats.json_calls import call_json, read_arguments
from pact_fast.chat.formats.messages import RECIPIENT, Header, MessageFormat
from pact_fast.chat.formats.registry import tool_format
from pact_fast.components import Component
from pact_fast.data.types import ToolCall, ToolSchema

_NEXT = "<|end|><|start|>assistant"  # between two messages of a turn
_MESSAGE = re.compile(
    rb"(?P<header>(?:(?!<\|message\|>|<\|end\|>|<\|start\|>).)*+)(?:<\|message\|>(?P<body>(?:(?!<\|end\|>|<\|call\|>).)*+))?"
    rb"(?:(?:<\|end\|>|<\|call\|>)\s*(?:<\|start\|>\s*(?:assistant)?)?|<\|start\|>\s*(?:assistant)?)?",
    re.DOTALL,
)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


@tool_format("harmony")
class Harmony(MessageFormat):
    """<|channel|>analysis<|message|>…, then to=functions.NAME<|channel|>commentary json<|message|>{…} or a final message.

    The generation prompt writes the beginning of the first message, `<|start|>assistant`. A call ends the turn, so there
    is one call per turn; text before it is a message on the channel `commentary`.
    """

    markers = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
    think = ("<|channel|>analysis<|message|>", "<|end|>")
    message = _MESSAGE

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

    def read_header(self, header: str) -> Header | None:
        channel, recipient = _CHANNEL.search(header), RECIPIENT.search(header)
        if recipient:
            return Header(Component.TOOL_CALL, recipient[1].removeprefix("functions."))
        if channel is None:
            return None
        return Header(Component.REASONING if channel[1] == "analysis" else Component.ANSWER)

    def read_call(self, name: str, body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
        return read_arguments(name, body, tools)
