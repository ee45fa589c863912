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


def find_tagged(
    data: bytes, start: int, opening: str, closing: str, section: tuple[str, str] | None = None
) -> list[Tagged]:
    """Everything between the tags from byte `start` on, at most MAX_CALLS and one error; in order, in linear time.

    Args:
        data: UTF-8 text of a turn.
        start: Where the first tag may stand.
        opening: The tag before a call.
        closing: The tag behind it.
        section: The tags around all calls of a turn; they belong to the first call and the last one.
    """
    found: list[Tagged] = []
    opened: re.Match[bytes] | None = None
    first, last = opening.encode(), closing.encode()
    for tag in _tags(first, last, section).finditer(data, start):
        if len(found) >= MAX_CALLS:
            found.append(Tagged((opened or tag).start(), len(data), error=TOO_MANY_CALLS))
            return found
        if tag.group().endswith(first):
            if opened:
                error = f"{opening} is not closed before the next {opening}"
                found.append(Tagged(opened.start(), tag.start(), error=error))
            opened = tag
        elif opened and tag.group().startswith(last):
            found.append(Tagged(opened.start(), tag.end(), data[opened.end() : tag.start()], opened.end()))
            opened = None
        elif opened:  # the end of the section
            found.append(
                Tagged(opened.start(), tag.end(), error=f"{opening} is not closed; end every call with {closing}")
            )
            opened = None
        else:
            what = next(text for text in (closing, *(section or ())) if tag.group().startswith(text.encode()))
            found.append(Tagged(tag.start(), tag.end(), error=f"{what} without {opening}"))
    if opened:
        error = f"{opening} is not closed; end every call with {closing}"
        found.append(Tagged(opened.start(), len(data), error=error))
    return found


def _tags(opening: bytes, closing: bytes, section: tuple[str, str] | None) -> re.Pattern[bytes]:
    """A pattern of either tag, with the tag of the section beside it; or of the section without a call."""
    first, last = map(re.escape, (opening, closing))
    if section is None:
        return re.compile(first + b"|" + last)
    begin, end = (re.escape(tag.encode()) for tag in section)
    return re.compile(rb"(?:%b\s*)?%b|%b(?:\s*%b)?|%b(?:\s*%b)?|%b" % (begin, first, last, end, begin, end, end))


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
