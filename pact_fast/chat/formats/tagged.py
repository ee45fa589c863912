"""Finds calls that stand between an opening and a closing tag, and arguments that do."""

from __future__ import annotations

import re
from typing import NamedTuple

from pact_fast.chat.formats.base import MAX_CALLS, TOO_MANY_CALLS


class Tagged(NamedTuple):
    """Bytes [start, end) with the tags, and the byte where the text between them begins; or the error instead of it."""

    start: int
    end: int
    body: bytes = b""
    body_start: int = 0
    error: str = ""


def find_tagged(data: bytes, start: int, opening: str, closing: str) -> list[Tagged]:
    """Everything between the tags from byte `start` on, at most MAX_CALLS and one error; in order, in linear time."""
    found: list[Tagged] = []
    opened: re.Match[bytes] | None = None
    first = opening.encode()
    for tag in re.compile(re.escape(first) + b"|" + re.escape(closing.encode())).finditer(data, start):
        if len(found) >= MAX_CALLS:
            found.append(Tagged((opened or tag).start(), len(data), error=TOO_MANY_CALLS))
            return found
        if tag.group() == first:
            if opened:
                error = f"{opening} is not closed before the next {opening}"
                found.append(Tagged(opened.start(), tag.start(), error=error))
            opened = tag
        elif opened:
            found.append(Tagged(opened.start(), tag.end(), data[opened.end() : tag.start()], opened.end()))
            opened = None
        else:
            found.append(Tagged(tag.start(), tag.end(), error=f"{closing} without {opening}"))
    if opened:
        error = f"{opening} is not closed; end every call with {closing}"
        found.append(Tagged(opened.start(), len(data), error=error))
    return found


def read_pairs(
    text: str, position: int, opening: re.Pattern[str], closing: re.Pattern[str], unclosed: str
) -> tuple[list[tuple[str, str]], int] | str:
    """(name, text) of the arguments that follow one another from `position` on, and where they end; or an error.

    Args:
        text: Text of a call.
        position: Where the first argument may begin.
        opening: What stands before an argument's text; its group 1 is the name.
        closing: What stands behind it.
        unclosed: The error for an argument without an end; `{}` stands for its name.
    """
    pairs: list[tuple[str, str]] = []
    while begin := opening.match(text, position):
        end = closing.search(text, begin.end())
        if not end:
            return unclosed.format(begin[1][:60])
        pairs.append((begin[1].strip(), text[begin.end() : end.start()]))
        position = end.end()
    return pairs, position
