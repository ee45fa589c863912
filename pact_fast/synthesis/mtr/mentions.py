"""Mentions of entities: the wording that a question uses for the entities of its facts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pact_fast.rewards.qa import normalize_answer

_TOKEN = re.compile(r"['’][sS]\b|\w+(?:(?:[-–.]|['’](?![sS]\b))\w+)*")  # a possessive is a word of its own


def mention(question: str, name: str) -> str | None:
    """The words of the question that name an entity: the name up to case, or the longest run of its words; None: none."""
    if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", question):
        return name
    spans = list(_TOKEN.finditer(question))
    wanted = [normalize_answer(word) for word in _TOKEN.findall(name)]
    found = [normalize_answer(match.group()) for match in spans]
    if not wanted:
        return None
    for start in range(len(found) - len(wanted) + 1):
        if found[start : start + len(wanted)] == wanted:
            return _trimmed(question[spans[start].start() : spans[start + len(wanted) - 1].end()])
    return shared_span(question, name)


def shared_span(question: str, text: str) -> str | None:
    """The longest run of words that both hold and that could be a name: with a capital or a digit; None: there is none."""
    spans = list(_TOKEN.finditer(question))
    ours = [normalize_answer(match.group()) or match.group().lower() for match in spans]
    theirs = [normalize_answer(word) or word.lower() for word in _TOKEN.findall(text)]
    best: tuple[int, int, int] | None = None  # letters, start, end
    for start in range(len(ours)):
        for other in range(len(theirs)):
            length = 0
            while (
                start + length < len(ours)
                and other + length < len(theirs)
                and ours[start + length] == theirs[other + length]
            ):
                length += 1
            span = _strong(spans, start, start + length) if length else None
            if span is not None:
                letters = spans[span[1] - 1].end() - spans[span[0]].start()
                if best is None or letters > best[0]:
                    best = letters, *span
    return question[spans[best[1]].start() : spans[best[2] - 1].end()] if best else None


def _strong(spans: Sequence[re.Match[str]], start: int, end: int) -> tuple[int, int] | None:
    """The run without lower-case words at its ends; None if nothing in it could be a name."""
    while start < end and not _is_strong(spans[start].group()):
        start += 1
    while start < end and not _is_strong(spans[end - 1].group()):
        end -= 1
    is_first_word = start == 0 and end - start == 1  # which has a capital anyway
    is_name = any(normalize_answer(spans[i].group()) for i in range(start, end)) and not is_first_word
    return (start, end) if is_name else None


def _is_strong(word: str) -> bool:
    return word[0].isupper() or word[0].isdigit()


def capitalised(question: str, taken: Sequence[str] = ()) -> str | None:
    """The longest run of capitalised words of a question that overlaps none in `taken`; None: there is none."""
    runs = re.findall(r"(?:[A-Z0-9][\w'’.&–-]*)(?:[\s,:–-]+(?:[A-Z0-9][\w'’.&–-]*|\([^()]*\)))*", question)
    free = [_trimmed(run) for run in runs if not any(one in run or run in one for one in taken)]
    first = question.split(maxsplit=1)[0] if question.split() else ""
    free = [run for run in free if run and run != first]
    return max(free, key=len) if free else None


def _trimmed(text: str) -> str:
    return text.strip(" ,:;?!–-")
