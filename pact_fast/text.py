"""Text from outside (a model, a data file, a server) on its way to a terminal or into a message."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

SHOWN = 60  # characters of a value in a message

# escape sequences could control the terminal; bidirectional controls, line separators and tag characters could show
# another text than the one that is there
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with control characters written as \\x1b or \\u202e; newlines and tabs stay."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`visible` text with its line breaks written as \\n: foreign text cannot imitate a line of ours."""
    return visible(text).replace("\n", "\\n")


def short(value: Any) -> str:
    """`repr` of a value, cut to 60 characters. Takes a bounded time, however large the value is when it is written out."""
    text = visible(_SHORT.repr(value))
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


class _Short(reprlib.Repr):
    """reprlib's bounded `repr`, which is unbounded for integers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 8
        self.maxstring = self.maxother = self.maxlong = 2 * SHOWN

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 4 * SHOWN else f"<an integer of {x.bit_length()} bits>"


_SHORT = _Short()


def first_difference(known: Any, given: Any, path: str = "") -> str | None:
    """`key: old value, now new value` of the first entry that differs between two JSON values; None if none does."""
    if isinstance(known, dict) and isinstance(given, dict):
        for key in [*known, *(key for key in given if key not in known)]:
            place = f"{path}.{key}" if path else str(key)
            if found := first_difference(known.get(key), given.get(key), place):
                return found
        return None
    return None if known == given else f"{path} was {_shown(known)}, now {_shown(given)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
