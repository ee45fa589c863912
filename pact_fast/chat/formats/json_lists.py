"""Finds calls in JSON lists behind a marker: [{"name": …, "arguments": {…}}, …]."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS, Found
from pact_fast.chat.formats.json_calls import json_end, read_call
from pact_fast.data.types import ToolSchema

_BLANKS = re.compile(r"\s*", re.ASCII)


def find_lists(
    data: bytes, start: int, marker: re.Pattern[bytes], tools: Sequence[ToolSchema], closing: bytes = b""
) -> list[Found]:
    """(start, end, call or error) of the calls in every list behind `marker` from byte `start` on, in linear time.

    Nothing is read of a list after a malformed call. The bytes of a list are shared out among its calls. Text after a
    list is text of the answer.

    Args:
        data: UTF-8 text of a turn.
        start: Where calls may begin.
        marker: What stands before a list.
        tools: Schemas that calls are checked against.
        closing: What may stand behind a list.
    """
    found: list[Found] = []
    places = [one.span() for one in marker.finditer(data, start)]
    for (begin, at), (end, _) in itertools.pairwise([*places, (len(data), 0)]):
        if len(found) >= MAX_CALLS:
            return [*found, (begin, len(data), TOO_MANY_CALLS)]
        found += _read_list(data[:end], begin, at, tools, closing, MAX_CALLS - len(found))
        if found[-1][2] == TOO_MANY_CALLS:
            return [*found[:-1], (found[-1][0], len(data), TOO_MANY_CALLS)]
    return found


def _read_list(
    data: bytes, begin: int, at: int, tools: Sequence[ToolSchema], closing: bytes, limit: int
) -> list[Found]:
    """The calls of the list that begins about byte `at`, the first with the bytes from `begin` on."""
    found: list[Found] = []
    text = data[at:].decode("latin-1")
    offset, at = at, _skip(text, 0)
    if not text.startswith("[", at):
        return [(begin, len(data), "the calls must be a JSON list: [{…}, …]")]
    at = _skip(text, at + 1)
    if text.startswith("]", at):
        return [(begin, _closed(data, offset + at + 1, closing), "the list of calls is empty")]
    while True:
        if len(found) == limit:
            return [*found, (begin, len(data), TOO_MANY_CALLS)]
        end = json_end(text, at)
        if end is None:
            return [*found, (begin, len(data), read_call(data[offset + at :], tools, "arguments"))]
        attempt = read_call(data[offset + at : offset + end], tools, "arguments")
        at = _skip(text, end)
        if text.startswith("]", at):
            return [*found, (begin, _closed(data, offset + at + 1, closing), attempt)]
        if not text.startswith(",", at):
            return [*found, (begin, len(data), "the list of calls is not closed; end it with ]")]
        found.append((begin, offset + end, attempt))
        begin, at = offset + end, _skip(text, at + 1)  # the comma belongs to the call after it


def _closed(data: bytes, end: int, closing: bytes) -> int:
    """The end of a list with the text allowed after it."""
    rest = data[end : end + len(closing) + 8].lstrip()
    return data.index(closing, end) + len(closing) if closing and rest.startswith(closing) else end


def _skip(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    return found.end() if found else at
