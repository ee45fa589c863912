"""Tool calls of LFM2 and LFM2.5: Python's notation between tags."""

from __future__ import annotations

from collections.abc import Sequence

from pact_fast.chat.chat_template import PROBE_NAME, ChatTemplate
from pact_fast.chat.formats import python_calls
from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS, Found, ToolFormat
from pact_fast.chat.formats.json_calls import NOT_UTF8
from pact_fast.chat.formats.layout import Layout
from pact_fast.chat.formats.registry import tool_format
from pact_fast.chat.formats.tagged import find_tagged
from pact_fast.data.types import ToolCall, ToolSchema

_START, _END = "<|tool_call_start|>", "<|tool_call_end|>"


@tool_format("lfm2")
class Lfm2(ToolFormat):
    """<|tool_call_start|>[f(x=1, y='text'), g()]<|tool_call_end|>: all calls of a turn in one list.

    Some templates escape nothing in strings; `fit` finds out which.
    """

    markers = (*ToolFormat.markers, _START, _END)
    end_of_call = _END
    layout = Layout("", "", "", "", "", "", "")
    _escaped = True

    def fit(self, template: ChatTemplate) -> ToolFormat:
        fitted = super().fit(template)
        call = ToolCall(PROBE_NAME, {"key": "a\nb"})
        fitted._escaped = "'a\nb'" not in template.render_call(call)  # type: ignore[attr-defined]
        return fitted

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        return _START + python_calls.write_calls(calls, self.markers, self._escaped) + _END

    def find_calls(self, data: bytes, start: int, tools: Sequence[ToolSchema]) -> list[Found]:
        found: list[Found] = []
        for one in find_tagged(data, start, _START, _END):
            if len(found) >= MAX_CALLS:
                found.append((one.start, len(data), TOO_MANY_CALLS))
                break
            if one.error:
                found.append((one.start, one.end, one.error))
            else:
                found += _split(one.start, one.body_start, one.end, one.body, tools, MAX_CALLS - len(found))
        return found


def _split(begin: int, at: int, end: int, body: bytes, tools: Sequence[ToolSchema], limit: int) -> list[Found]:
    """The calls of a list, with spans that share out the bytes [begin, end) of the list and its tags."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        return [(begin, end, NOT_UTF8)]
    attempts = python_calls.read_calls(text, tools, limit)
    found: list[Found] = []
    done = 0
    for place, attempt in attempts:
        at += len(text[done:place].encode("utf-8"))
        done = place
        found.append((begin, at, attempt))
        begin = at
    found[-1] = (found[-1][0], end, found[-1][2])
    return found
