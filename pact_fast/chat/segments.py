"""Segments of a reasoning text, and the prefix of it that SFT supervises at a step (docs/method.md, section 2).

A segment is a sentence, a line or a list item. Prefixes consist of whole segments, from L0 (nothing) to L4 (the longest
safe prefix), so that none ends inside a number, a URL, an abbreviation, JSON or code.

The safe prefix ends before the first segment that reveals a call: one with call syntax (<tool_call>, a JSON object with a
"name" or with the name of an argument), an argument with its value (key=value, "key": value), or the tool's name. A name
that is an ordinary word ("search") counts only where it is used as a name: in quotes, before "(", or beside "tool",
"function", "API" or "call". A value alone does not count: reasoning must be able to name what the question names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence

from pact_fast.data.types import ToolCall

LEVELS = 4

# Code and URLs come first: they contain no boundary. A run of stops is tried once, from its beginning and whole (++):
# otherwise thousands of dots before a letter take time quadratic in their number.
_SCAN = re.compile(
    r"""(?P<code>```.*?(?:```|\Z)|`[^`\n]*`)
      | (?P<url>(?:https?|ftp|file)://\S*[^\s.,;:!?)\]}"'])
      | (?P<line>\n\s*)
      | (?P<stop>(?<![.!?…])[.!?…]++["'”’)\]*_]*+(?:\s+|\Z))
      | (?P<wide>[。！？]+["”’」』）]*\s*)""",
    re.VERBOSE | re.DOTALL,
)
_ABBREVIATIONS = (
    "e.g i.e etc vs cf approx no nos fig eq sec ch vol pp ca dr mr mrs ms prof sr jr st inc ltd co corp dept est "
    "jan feb mar apr jun jul aug sep sept oct nov dec a.m p.m u.s u.k"
)
# Before a full stop: an abbreviation, an initial ("J."), or the number of a list item at the start of a line ("2.").
_ABBREVIATION = "|".join(map(re.escape, _ABBREVIATIONS.split()))
_NO_END = re.compile(rf"(?:[\s(\[\"'](?:(?i:{_ABBREVIATION})|[A-Z])|\n[ \t>*-]*(?:\d{{1,3}}|[A-Za-z]))\Z")
_LOOK_BACK = 24

_SYNTAX = re.compile(r"</?tool_call>|<\|python_tag\|>")
_JSON_KEY = re.compile(r"\{\s*[\"'](\w+)[\"']\s*:")
_CALL_KEYS = frozenset(("name", "arguments", "parameters", "function"))
_ASSIGNED = re.compile(r"[\"'`]?\s?[=:]\s?[\"'`]?")
_USED_AFTER = re.compile(r"\s?\(|\s(?:tool|function|API|call)\b")
_USED_BEFORE = re.compile(r"\b(?:tool|function|API|call|calling)\s\Z")


def segments(reasoning: str) -> list[tuple[int, int]]:
    """(start, end) characters of the segments. They tile the text; whitespace after a segment belongs to it."""
    spans: list[tuple[int, int]] = []
    start = 0
    for cut in _boundaries(reasoning):
        if reasoning[start:cut].strip():
            spans.append((start, cut))
            start = cut
    if start < len(reasoning):
        spans.append((start, len(reasoning)))
    return spans


def prefix_ends(reasoning: str, calls: Sequence[ToolCall], given: Sequence[int] | None = None) -> list[int]:
    """[5] ends of the prefixes L0 … L4, in characters. L4 is the longest safe prefix; L1 to L3 split its segments evenly.

    `given`: ends of the segments (`ExpertTurn.segments`); None: those of `segments`.
    """
    ends = [end for _, end in segments(reasoning)] if given is None else given
    revealed = _first_reveal(reasoning, calls)
    safe = sum(end <= revealed for end in ends)
    counts = [-(-safe * level // LEVELS) for level in range(LEVELS + 1)]
    return [ends[count - 1] if count else 0 for count in counts]


def reasoning_level_at(step: int, horizon: int, start: int, end: int) -> int:
    """Prefix level at a step: linear from `start` to `end` over `horizon` steps, rounded half up."""
    return math.floor(sft_lambda(step, horizon, start, end) + 0.5)


def sft_lambda(step: int, horizon: int, start: float, end: float) -> float:
    """SFT weight of tool calls: λ(s) = λ_start − (λ_start − λ_end)·min(s/S, 1) (docs/method.md, section 2)."""
    return start - (start - end) * min(step / max(horizon, 1), 1.0)


def _boundaries(text: str) -> Iterator[int]:
    """Characters at which a segment may end, ascending."""
    groups = _bracket_groups(text)
    inside = 0  # end of the bracket groups that began before the match
    for match in _SCAN.finditer(text):
        while groups and groups[-1][0] < match.start():
            inside = max(inside, groups.pop()[1])
        kind = match.lastgroup
        if match.start() < inside or kind in ("code", "url"):
            continue
        if kind != "stop" or _ends_sentence(text, match):
            yield match.end()


def _bracket_groups(text: str) -> list[tuple[int, int]]:
    """(start, end) of balanced {…} and […], in descending order of start."""
    opened: list[tuple[str, int]] = []
    groups: list[tuple[int, int]] = []
    for match in re.finditer(r"[{}\[\]]", text):
        bracket = match.group()
        if bracket in "{[":
            opened.append(("}" if bracket == "{" else "]", match.start()))
        elif opened and opened[-1][0] == bracket:
            groups.append((opened.pop()[1], match.end()))
    return sorted(groups, reverse=True)


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """Whether a stop ends a sentence: not after an abbreviation, an initial or a list number, nor before lower case."""
    stop = match.start()
    if text[stop] != "." or text[stop + 1 : stop + 2] == ".":
        return True
    before = text[stop - _LOOK_BACK : stop] if stop > _LOOK_BACK else "\n" + text[:stop]
    return not _NO_END.search(before) and not text[match.end() : match.end() + 1].islower()


def _first_reveal(text: str, calls: Sequence[ToolCall]) -> int:
    """Character at which a call is first revealed; beyond the text if nowhere."""
    keys = _CALL_KEYS.union(*(call.arguments for call in calls))
    found = [match.start() for match in _SYNTAX.finditer(text)]
    found += [match.start() for match in _JSON_KEY.finditer(text) if match.group(1) in keys]
    for call in calls:
        found += _names(text, call.name)
        for key, value in call.arguments.items():
            found += _assignments(text, key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return min(found, default=len(text) + 1)


def _names(text: str, name: str) -> Iterator[int]:
    ordinary = name.isalpha() and (name.islower() or name.istitle())
    for start, end in _words(text, name):
        quoted = text[start - 1 : start] in ('"', "'", "`") and text[end : end + 1] in ('"', "'", "`")
        beside = _USED_AFTER.match(text, end) or _USED_BEFORE.search(text[max(0, start - 12) : start])
        if not ordinary or quoted or beside:
            yield start


def _assignments(text: str, key: str, value: str) -> Iterator[int]:
    for start, end in _words(text, key):
        assigned = _ASSIGNED.match(text, end)
        if assigned and value and text.startswith(value, assigned.end()):
            yield start


def _words(text: str, word: str) -> Iterator[tuple[int, int]]:
    """(start, end) of occurrences of `word` that are not part of a longer word."""
    start = text.find(word) if word else -1
    while start >= 0:
        end = start + len(word)
        if not text[start - 1 : start].isalnum() and not text[end : end + 1].isalnum():
            yield start, end
        start = text.find(word, end)
