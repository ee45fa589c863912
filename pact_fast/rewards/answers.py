"""How close a final answer is to the reference (method, section 3)."""

from __future__ import annotations

import unicodedata
from collections import Counter

OPEN, CLOSE = "<answer>", "</answer>"


def extract_answer(text: str) -> str:
    """The text inside the last <answer>…</answer>, or all of `text` when there is none."""
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(end, 0))
    return text[start + len(OPEN) : end] if start >= 0 else text


def answer_tokens(text: str) -> list[str]:
    """Lower-cased words at white space, without punctuation and symbols (Unicode categories P and S)."""
    return "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PS").split()


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two texts, counted as multisets, in [0, 1]. Two texts without words score 1."""
    got, want = answer_tokens(prediction), answer_tokens(reference)
    if not got and not want:
        return 1.0
    return 2 * (Counter(got) & Counter(want)).total() / (len(got) + len(want))


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two texts have the same words in the same order."""
    return answer_tokens(prediction) == answer_tokens(reference)
