"""ToolFormat, the base of tool-call formats: renders an assistant turn, and parses one that a model wrote.

A format never raises on model output. Text that looks like a call becomes a ToolCall, or an error text with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pact_fast.chat.chat_template import ChatTemplate
from pact_fast.chat.formats.layout import PROBE_CALL, Layout, measured_layout
from pact_fast.components import Component
from pact_fast.data.types import ToolCall, ToolSchema

MAX_CALLS = 64  # attempts parsed per turn; a model that writes more is stuck in a loop
TOO_MANY_CALLS = f"more than {MAX_CALLS} tool calls in one turn; only the first {MAX_CALLS} are read"

THINK, END_THINK = "<think>", "</think>"

Span = tuple[int, int, Component]
Found = tuple[int, int, ToolCall | str]  # start, end, call or error


@dataclass
class ParsedTurn:
    """A parsed assistant turn.

    text        the whole turn, without its end-of-turn token
    reasoning   text of the think block
    content     visible text
    attempts    the calls in order; a malformed one is the text of its error
    spans       (start, end, component) byte ranges: in order, without gaps, covering the whole turn
    components  [n] uint8 per token; filled in by ChatRenderer.parse
    """

    text: str
    reasoning: str = ""
    content: str = ""
    attempts: list[ToolCall | str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    components: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    @property
    def calls(self) -> list[ToolCall]:
        return [a for a in self.attempts if isinstance(a, ToolCall)]

    @property
    def errors(self) -> list[str]:
        return [a for a in self.attempts if isinstance(a, str)]


class ToolFormat:
    """Base class. A subclass implements `write_calls` and `find_calls`, and is registered with `@tool_format(name)`.

    markers      strings that structure a turn; rendered as single tokens if the tokenizer has them
    end_of_call  the marker that ends a call; None if there is none
    think        the tags around the reasoning, of which a generation prompt may write the first
    layout       the blanks between the parts of a turn; `fit` measures those of a template
    """

    markers: tuple[str, ...] = (THINK, END_THINK)
    end_of_call: str | None = None
    think: tuple[str, str] = (THINK, END_THINK)
    layout = Layout()

    def fit(self, template: ChatTemplate) -> ToolFormat:
        """This format, as the template writes it."""
        text = template.render_call(PROBE_CALL)
        fitted = copy.copy(next((one for one in self.variants() if one.write_calls([PROBE_CALL]) in text), self))
        fitted.layout = measured_layout(template, fitted.write_calls([PROBE_CALL]), self.think, self.layout)
        return fitted

    def variants(self) -> Sequence[ToolFormat]:
        """The ways in which templates write this format, where one call shows which; `fit` chooses."""
        return [self]

    def pieces(self, reasoning: str, content: str, calls: Sequence[ToolCall]) -> list[tuple[str, Component]]:
        """(text, component) pieces of an assistant turn, without its end-of-turn token. Whitespace leads the next piece."""
        pieces: list[tuple[str, Component]] = []
        gap = self.layout.before_turn
        if reasoning:
            pieces.append((gap + self.reasoning_block(self._escape_markers(reasoning)), Component.REASONING))
            gap = self.layout.after_reasoning if content or not calls else self.layout.reasoning_calls
        if content:
            pieces.append((gap + self._escape_markers(content), Component.ANSWER))
            gap = self.layout.before_calls
        if calls:
            pieces.append((gap + self.write_calls(calls) + self.layout.after_calls, Component.TOOL_CALL))
        elif not content and gap:
            pieces.append((gap, Component.ANSWER))
        return pieces

    def reasoning_block(self, reasoning: str) -> str:
        """The reasoning between its tags."""
        return f"{self.think[0]}{self.layout.in_reasoning}{reasoning}{self.layout.end_reasoning}{self.think[1]}"

    def render(self, reasoning: str, content: str, calls: Sequence[ToolCall]) -> str:
        """The text of an assistant turn without its end-of-turn token."""
        return "".join(text for text, _ in self.pieces(reasoning, content, calls))

    def parse(self, data: bytes, tools: Sequence[ToolSchema], *, thinking: bool = False) -> ParsedTurn:
        """Parse a turn, in linear time and without exceptions.

        Reasoning is the text between the tags `think`, of which the first stands at the very start; if never closed, it
        extends to the end. A turn without any attempt at a call is an answer.

        Args:
            data: UTF-8 text of the turn; invalid bytes are replaced.
            tools: Schemas that calls are checked against.
            thinking: The generation prompt has already written the opening tag of the reasoning.
        """
        turn = ParsedTurn(data.decode("utf-8", "replace"))
        start, turn.reasoning = _read_reasoning(data, thinking, self.think)
        if start:
            turn.spans.append((0, start, Component.REASONING))
        found = self.find_calls(data, start, tools) if start < len(data) else []
        for begin, end, attempt in found:
            turn.spans.append((begin, end, Component.TOOL_CALL))
            turn.attempts.append(attempt)
        turn.spans, turn.content = _fill(data, turn.spans)
        return turn

    def _escape_markers(self, text: str) -> str:
        """Replace the angle bracket of every marker in `text` by ‹, so that it is not parsed as a marker."""
        for marker in self.markers:
            text = text.replace(marker, "‹" + marker[1:])
        return text

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        """The text of one or more calls."""
        raise NotImplementedError

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        """(start, end, call or error) of every attempt from byte `start` on, in order, without overlap."""
        raise NotImplementedError


def _read_reasoning(data: bytes, thinking: bool, tags: tuple[str, str]) -> tuple[int, str]:
    """(end of the reasoning span, reasoning)."""
    opening, closing = (tag.encode() for tag in tags)
    lead = len(data) - len(data.lstrip())
    if data.startswith(opening, lead):
        lead += len(opening)
    elif not thinking:
        return 0, ""
    close = data.find(closing, lead)
    inside = data[lead:] if close < 0 else data[lead:close]
    return len(data) if close < 0 else close + len(closing), inside.decode("utf-8", "replace").strip()


def _fill(data: bytes, spans: list[Span]) -> tuple[list[Span], str]:
    """(spans without gaps, visible text). Whitespace belongs to the next span; at the end, to the previous one."""
    filled: list[Span] = []
    content: list[str] = []
    position = 0
    for start, end, component in [*spans, (len(data), len(data), Component.ANSWER)]:
        text = data[position:start]
        kept = text.rstrip()
        if kept:
            filled.append((position, position + len(kept), Component.ANSWER))
            content.append(kept.decode("utf-8", "replace").strip())
            position += len(kept)
        if end > start:
            filled.append((position, end, component))
            position = end
    if position < len(data):  # only whitespace is left
        if filled and filled[-1][2] is not Component.REASONING:
            filled[-1] = (filled[-1][0], len(data), filled[-1][2])
        else:  # after reasoning, or nothing else: an empty answer
            filled.append((position, len(data), Component.ANSWER))
    return filled, "\n".join(content)
