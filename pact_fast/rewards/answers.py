"""Token F1 of a final answer and its reference (docs/method.md, section 3)."""

from __future__ import annotations

import unicodedata
from collections import Counter

OPEN, CLOSE = "<answer>", "</answer>"


def extract_answer(text: str) -> str:
    """The text inside the last <answer>…</answer>, or all of `text` if there is none."""
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(end, 0))
    return text[start + len(OPEN) : end] if start >= 0 else text


def answer_tokens(text: str) -> list[str]:
    """Words of a text: lower case, without punctuation and symbols (Unicode categories P and S), split at whitespace."""
    return "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PS").split()


def token_f1(prediction: str, reference: str) -> float:
    """F1 in [0, 1] of the words of two texts, as multisets. Two texts without words score 1."""
    got, want = answer_tokens(prediction), answer_tokens(reference)
    if not got and not want:
        return 1.0
    return 2 * (Counter(got) & Counter(want)).total() / (len(got) + len(want))
