"""How tool calls are written: rendering an assistant turn, and reading one that a model wrote.

A format never raises on model output. Whatever looks like a call becomes a ToolCall or an error text that says why not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pact_fast.data.tool_schema import call_error, tool_names
from pact_fast.data.types import Component, ToolCall, ToolSchema
from pact_fast.errors import PactError

MAX_CALLS = 64  # attempts read per turn; a model that writes more is stuck in a loop
MAX_DEPTH = 64  # nesting of arguments
MAX_ERROR = 400  # characters of an error observation

THINK, END_THINK = "<think>", "</think>"

Span = tuple[int, int, Component]
Found = tuple[int, int, ToolCall | str]  # start, end, call or error


@dataclass
class ParsedTurn:
    """An assistant turn, read.

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
    """Base of the formats. A subclass says how calls are written and where they are found.

    `markers` are the strings with which a turn is structured; where the tokenizer has them as single tokens, turns
    contain those tokens.
    """

    name: str
    markers: tuple[str, ...] = (THINK, END_THINK)
    end_of_call: str | None = None  # the marker that closes a call, if there is one

    def pieces(self, reasoning: str, content: str, calls: Sequence[ToolCall]) -> list[tuple[str, Component]]:
        """The text of an assistant turn without its end, cut by component. Whitespace belongs to what follows it."""
        pieces: list[tuple[str, Component]] = []
        gap = ""
        if reasoning:
            pieces.append((f"{THINK}\n{self._inert(reasoning)}\n{END_THINK}", Component.REASONING))
            gap = "\n\n"
        if content:
            pieces.append((gap + self._inert(content), Component.ANSWER))
            gap = "\n"
        if calls:
            pieces.append((gap + self._calls_text(calls), Component.TOOL_CALL))
        elif not content and gap:
            pieces.append((gap, Component.ANSWER))
        return pieces

    def render(self, reasoning: str, content: str, calls: Sequence[ToolCall]) -> str:
        """The text of an assistant turn without its end-of-turn token."""
        return "".join(text for text, _ in self.pieces(reasoning, content, calls))

    def parse(self, data: bytes, tools: Sequence[ToolSchema], *, thinking: bool = False) -> ParsedTurn:
        """Read a turn; linear time, never an exception. `thinking`: the prompt has already opened <think>.

        Reasoning is what stands between <think> at the very start and </think>; never closed, it goes on to the end.
        Without any attempt at a call the turn is an answer.
        """
        turn = ParsedTurn(data.decode("utf-8", "replace"))
        start, turn.reasoning = _read_reasoning(data, thinking)
        if start:
            turn.spans.append((0, start, Component.REASONING))
        found = self._find(data, start, tools) if start < len(data) else []
        for begin, end, attempt in found:
            turn.spans.append((begin, end, Component.TOOL_CALL))
            turn.attempts.append(attempt)
        turn.spans, turn.content = _fill(data, turn.spans)
        return turn

    def _inert(self, text: str) -> str:
        """Text in which no marker stands: a marker's angle bracket becomes a similar character."""
        for marker in self.markers:
            text = text.replace(marker, "‹" + marker[1:])
        return text

    def _calls_text(self, calls: Sequence[ToolCall]) -> str:
        raise NotImplementedError

    def _find(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        """(start, end, call or error) of every attempt after `start`, in order, not overlapping."""
        raise NotImplementedError


class Hermes(ToolFormat):
    """<tool_call>{"name": …, "arguments": …}</tool_call>; Qwen, Hermes and many others."""

    name = "hermes"
    markers = (*ToolFormat.markers, "<tool_call>", "</tool_call>")
    end_of_call = "</tool_call>"

    def _calls_text(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"<tool_call>\n{_json(call.to_json(), self.markers)}\n</tool_call>" for call in calls)

    def _find(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found: list[Found] = []
        opened: re.Match[bytes] | None = None
        for tag in re.compile(rb"</?tool_call>").finditer(data, start):
            if len(found) >= MAX_CALLS:
                found.append(((opened or tag).start(), len(data), _TOO_MANY))
                return found
            if tag.group() == b"<tool_call>":
                if opened:
                    found.append((opened.start(), tag.start(), "<tool_call> is not closed before the next <tool_call>"))
                opened = tag
            elif opened:
                found.append(
                    (opened.start(), tag.end(), _read_call(data[opened.end() : tag.start()], tools, "arguments"))
                )
                opened = None
            else:
                found.append((tag.start(), tag.end(), "</tool_call> without <tool_call>"))
        if opened:
            found.append((opened.start(), len(data), "<tool_call> is not closed; end every call with </tool_call>"))
        return found


class Llama3Json(ToolFormat):
    """{"name": …, "parameters": …}, several joined by "; "; Llama 3.1 and later.

    The format has no markers. JSON is an attempt if it has the shape of a call: "parameters" or "arguments", or the
    name of a known tool. JSON that is broken is an attempt where only a call can stand: at the start of the turn, after
    another call, or after <|python_tag|>. Any other JSON is text of the answer.
    """

    name = "llama3_json"
    _opening = re.compile(rb'(?:<\|python_tag\|>\s*)?\{\s*"(?:name|type|function)"\s*:|<\|python_tag\|>')

    def _calls_text(self, calls: Sequence[ToolCall]) -> str:
        return "; ".join(_json({"name": call.name, "parameters": call.arguments}, self.markers) for call in calls)

    def _find(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found: list[Found] = []
        text = data.decode("latin-1")  # JSON's structure is ASCII, and each byte is one character
        names = tool_names(tools)
        free, expected = start, _skip(data, start)  # end of what is read; only a call can begin at `expected`
        position = start
        for _ in range(4 * MAX_CALLS):  # bounds the time on text that is full of things like calls
            opening = self._opening.search(data, position)
            if not opening:
                break
            begin, brace = opening.start(), data.find(b"{", opening.start(), opening.end())
            first = free if found and begin == expected else begin  # a separator belongs to the call that follows it
            if len(found) == MAX_CALLS:
                found.append((first, len(data), _TOO_MANY))
                break
            value, position = _scan_json(text, brace) if brace >= 0 else (None, opening.end())
            if _call_shaped(value, names):
                found.append((first, position, _read_call(data[brace:position], tools, "parameters")))
                free, expected = position, _skip(data, position)
            elif value is None and (begin == expected or brace != begin):
                found.append((first, len(data), _read_call(data[max(brace, begin) :], tools, "parameters")))
                break
        return found


FORMATS: dict[str, ToolFormat] = {f.name: f for f in (Hermes(), Llama3Json())}
_TOO_MANY = f"more than {MAX_CALLS} tool calls in one turn; only the first {MAX_CALLS} are read"


def get_format(name: str) -> ToolFormat:
    """A format by its name in the configuration."""
    if name not in FORMATS:
        raise PactError(f"no tool format '{name}'; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def detect_format(tokenizer) -> ToolFormat:
    """The format in which the tokenizer's chat template writes a tool call. PactError if it is none of ours."""
    from pact_fast.data.chat_template import ChatTemplate

    call = ToolCall("look_up", {"name": "a", "n": 1})
    text = ChatTemplate(tokenizer).with_call(call)
    for tool_format in FORMATS.values():
        if tool_format.render("", "", [call]) in text:
            return tool_format
    raise PactError(
        f"the chat template writes tool calls in none of the known formats ({', '.join(FORMATS)}); set "
        "model.chat_template to a template that does"
    )


def error_observation(error: str) -> str:
    """What the model reads instead of a tool's answer: {"error": "…"}, at most 400 characters."""
    shown = error[:MAX_ERROR]
    while len(text := json.dumps({"error": shown + "…" * (shown != error)}, ensure_ascii=False)) > MAX_ERROR:
        shown = shown[:-8]
    return text


def _read_reasoning(data: bytes, thinking: bool) -> tuple[int, str]:
    """(end of the reasoning span, reasoning)."""
    lead = len(data) - len(data.lstrip())
    if data.startswith(THINK.encode(), lead):
        lead += len(THINK)
    elif not thinking:
        return 0, ""
    close = data.find(END_THINK.encode(), lead)
    inside = data[lead:] if close < 0 else data[lead:close]
    return len(data) if close < 0 else close + len(END_THINK), inside.decode("utf-8", "replace").strip()


def _fill(data: bytes, spans: list[Span]) -> tuple[list[Span], str]:
    """Spans without gaps, and the visible text. Blanks belong to what follows; at the end, to what precedes."""
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
    if position < len(data):  # blank
        if filled and filled[-1][2] is not Component.REASONING:
            filled[-1] = (filled[-1][0], len(data), filled[-1][2])
        else:  # after reasoning, or all there is: an empty answer
            filled.append((position, len(data), Component.ANSWER))
    return filled, "\n".join(content)


def _read_call(body: bytes, tools: Sequence[ToolSchema], key: str) -> ToolCall | str:
    """One call from its JSON, or why it is none."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
        if _depth_exceeds(value, MAX_DEPTH):
            return f"the call is nested deeper than {MAX_DEPTH} levels"
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "the call holds half of a surrogate pair (\\ud800 to \\udfff)"
    except UnicodeDecodeError:
        return "the call is not valid UTF-8"
    except RecursionError:
        return f"the call is nested deeper than {MAX_DEPTH} levels"
    except ValueError as error:
        return f"the call is not valid JSON: {str(error)[:200]}"
    if not isinstance(value, dict):
        return f'the call must be a JSON object {{"name": …, "{key}": …}}'
    other = "parameters" if key == "arguments" else "arguments"
    body_value = value if "name" in value or not isinstance(value.get("function"), dict) else value["function"]
    name, arguments = body_value.get("name"), body_value.get(key, body_value.get(other))
    if not isinstance(name, str) or not name:
        return 'the call has no string "name"'
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return f'"{key}" must be a JSON object'
    call = ToolCall(name, arguments)
    return call_error(call, tools) or call


def _json(value: Any, markers: Sequence[str]) -> str:
    """JSON in which no marker stands: where an argument holds one, angle brackets are written as escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("<", "\\u003c") if any(marker in text for marker in markers) else text


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if limit == 0:
        return True
    return any(_depth_exceeds(item, limit - 1) for item in (value.values() if isinstance(value, dict) else value))


_DECODER = json.JSONDecoder()


def _scan_json(text: str, start: int) -> tuple[Any, int]:
    """(value, its end) of the JSON at `start`; (None, start + 1) if it is malformed."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start + 1


def _call_shaped(value: Any, names: Collection[str]) -> bool:
    if not isinstance(value, dict):
        return False
    if "name" not in value and isinstance(value.get("function"), dict):
        value = value["function"]
    return "name" in value and ("parameters" in value or "arguments" in value or value["name"] in names)


def _skip(data: bytes, position: int) -> int:
    """Past separators and white space."""
    blank = re.compile(rb"[;,\s]*").match(data, position)
    return blank.end() if blank else position
