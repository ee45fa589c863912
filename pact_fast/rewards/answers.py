"""Token F1 of a final answer and its reference (docs/method.md, section 3)."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from decimal import Decimal

OPEN, CLOSE = "<answer>", "</answer>"

# A number: sign, digits with commas as thousands separators, decimals, exponent. An integer with leading zeros is a code.
NUMBER = re.compile(r"[+-]?(?!0\d+(?:e|$))(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?")
MINUS = str.maketrans("−﹣－", "---")  # the minus sign and its compatibility forms
VARIATION_SELECTORS = "\ufe0e\ufe0f"  # text or emoji style of the character before


def extract_answer(text: str) -> str:
    """The text inside the last <answer>…</answer>, or all of `text` if there is none."""
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(end, 0))
    return text[start + len(OPEN) : end] if start >= 0 else text


def answer_tokens(text: str, symbols: bool = False) -> list[str]:
    """Words of a text, in lower case, split at whitespace, without punctuation and symbols (Unicode categories P and S).

    A number is one word, written in one way: 42.0, +42 and 4.2e1 are "42"; 3,776 is "3776"; −5 is "-5". Punctuation
    between two digits of another word stays, as "/": 1/2 is not 12, and 10:30 is not 1030.

    Args:
        text: The text, in any normal form of Unicode.
        symbols: Every punctuation mark and symbol is a word of its own, for texts that hold nothing else: 👍.
    """
    text = "".join(c for c in unicodedata.normalize("NFC", text.lower()) if _counts(c))
    if symbols:
        return "".join(f" {c} " if _is_symbol(c) else c for c in text).split()
    return [word for word in map(_word, text.split()) if word]


def token_f1(prediction: str, reference: str) -> float:
    """F1 in [0, 1] of the words of two texts, as multisets. 0 if one of them is empty, or both."""
    got, want = answer_tokens(prediction), answer_tokens(reference)
    if not got or not want:  # a text of symbols only is compared by its symbols
        got, want = answer_tokens(prediction, symbols=True), answer_tokens(reference, symbols=True)
    if not got or not want:
        return 0.0
    return 2 * (Counter(got) & Counter(want)).total() / (len(got) + len(want))


def _word(word: str) -> str:
    """A word without punctuation, or a number in its one spelling; "" if nothing is left."""
    number = _strip(word.translate(MINUS))
    if NUMBER.fullmatch(number):
        return _number(number)
    kept = []
    for i, c in enumerate(word):
        if not _is_symbol(c):
            kept.append(c)
        elif c != "," and word[i - 1 : i].isdigit() and word[i + 1 : i + 2].isdigit():
            kept.append("/")
    return "".join(kept)


def _strip(word: str) -> str:
    """A word without the punctuation and symbols around it; a sign or a decimal point before a digit stays: "($-5.)"."""
    start, end = 0, len(word)
    while end and _is_symbol(word[end - 1]):
        end -= 1
    while start < end and _is_symbol(word[start]):
        start += 1
    point = start - 1 if word[start - 1 : start] == "." else start
    currency = point - 1
    while currency > 0 and unicodedata.category(word[currency]) == "Sc":  # the sign may stand before it: -$5
        currency -= 1
    sign = word[currency] if currency >= 0 and word[currency] in "+-" else ""
    return sign + word[point:end]


def _number(text: str) -> str:
    """The decimal digits of a number, exactly: without "+", zeros that add nothing, and exponent."""
    plain = format(Decimal(text.replace(",", "")), "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain.lstrip("-").strip("0") == "" else plain


def _counts(c: str) -> bool:
    """Whether a character can be seen: not a zero-width format character, nor a variation selector."""
    return c not in VARIATION_SELECTORS and unicodedata.category(c) != "Cf"


def _is_symbol(c: str) -> bool:
    return unicodedata.category(c)[0] in "PS"
