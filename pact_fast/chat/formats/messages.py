"""Turns made of messages whose headers name their kind and recipient: the parser shared by such formats."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from pact_fast.chat.chat_template import ChatTemplate
from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS, Found, ParsedTurn, ToolFormat
from pact_fast.chat.formats.layout import Layout
from pact_fast.components import Component
from pact_fast.data.types import ToolCall, ToolSchema

MAX_MESSAGES = 4 * MAX_CALLS  # of a turn; a model that writes more is stuck in a loop, and the rest is one text
RECIPIENT = re.compile(r"\bto=(\S+?)(?=\s|<\||$)")  # in a header


class Header(NamedTuple):
    """Parsed header of a message: the component of its text and, for a call, the name of the tool."""

    component: Component
    name: str = ""


class Message(NamedTuple):
    """Bytes [start, end) of a message, up to the header of the next one; `body` is None without a text."""

    start: int
    end: int
    header: Header
    body: bytes | None


class MessageFormat(ToolFormat):
    """Base class of formats whose turns are messages.

    message  matches a message, up to the header of the next one, in linear time; groups `header` and `body`
    """

    message: ClassVar[re.Pattern[bytes]]
    layout = Layout("", "", "", "", "", "", "")

    @abstractmethod
    def read_header(self, header: str) -> Header | None:
        """Parse a header. Return None if the text is not a header but part of an answer."""

    @abstractmethod
    def read_call(self, name: str, body: bytes, tools: Sequence[ToolSchema]) -> ToolCall | str:
        """The call that a message to a tool makes, or the text of its error."""

    def fit(self, template: ChatTemplate) -> ToolFormat:
        return self  # there are no blanks to measure

    def parse(self, data: bytes, tools: Sequence[ToolSchema], *, thinking: bool = False) -> ParsedTurn:
        turn = ParsedTurn(data.decode("utf-8", "replace"))
        reasoning: list[str] = []
        content: list[str] = []
        for message in self._messages(data):
            component = message.header.component
            text = (message.body or b"").decode("utf-8", "replace").strip()
            if component is Component.TOOL_CALL:
                turn.attempts.append(
                    self._attempt(message, tools) if len(turn.attempts) < MAX_CALLS else TOO_MANY_CALLS
                )
            elif component is Component.REASONING:
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
        calls = [one for one in self._messages(data[start:]) if one.header.component is Component.TOOL_CALL]
        return [(start + one.start, start + one.end, self._attempt(one, tools)) for one in calls[:MAX_CALLS]]

    def _messages(self, data: bytes) -> list[Message]:
        """The messages of a turn that begins after `<|start|>assistant`. Text without a header is an answer."""
        found: list[Message] = []
        position = 0
        while position < len(data):
            if len(found) == MAX_MESSAGES:
                found.append(Message(position, len(data), Header(Component.ANSWER), data[position:]))
                break
            match = self.message.match(data, position)
            if match is None or match.end() == position:
                break
            header, body = self.read_header(match["header"].decode("utf-8", "replace")), match["body"]
            if header is None and body is None:
                body = match["header"]
            found.append(Message(position, match.end(), header or Header(Component.ANSWER), body))
            position = match.end()
        return found

    def _attempt(self, message: Message, tools: Sequence[ToolSchema]) -> ToolCall | str:
        name = message.header.name
        if message.body is None:
            return f"the call of {name[:60]} has no <|message|> with its arguments"
        return self.read_call(name, message.body, tools)
