"""Finds calls that stand between an opening and a closing tag."""

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
