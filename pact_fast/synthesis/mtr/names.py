"""Names of tools. A name is a pure function of the relation, so that near-duplicates get one name in all rows."""

from __future__ import annotations

import keyword
import re
import unicodedata

MAX_NAME = 64  # of OpenAI's schema
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_QUESTION = frozenset(("who", "whom", "whose", "what", "which", "when", "where", "why", "how"))
_AUXILIARY = frozenset(("is", "are", "was", "were", "be", "been", "do", "does", "did", "has", "have", "had"))
_SMALL = frozenset(("a", "an", "the", "of", "in", "on", "at", "to", "by", "for", "from", "with", "and", "or", "as"))
_SMALL |= frozenset(("into", "that", "this", "it", "its", "there"))
_LEADING = _QUESTION | _AUXILIARY | {"a", "an", "the"}
_WORDS = 5  # of a name made from a sub-question


def tool_name(relation: str) -> str:
    """`get_date_of_birth`; from a sub-question, `get_company_published`: at most five words that say something.

    Case, accents, punctuation and the plural s are lost, so that near-duplicates agree: "Directors" and "director".
    """
    plain = unicodedata.normalize("NFKD", relation).encode("ascii", "ignore").decode().lower()
    words = re.findall(r"[a-z0-9]+", plain)
    while len(words) > 1 and words[0] in _LEADING:
        words = words[1:]
    kept = (
        words if len(words) <= 3 else [word for word in words if word not in _QUESTION | _AUXILIARY | _SMALL] or words
    )
    kept = [_singular(word) for word in kept[:_WORDS]]
    name = "get_" + ("_".join(kept) or "fact")
    return name[:MAX_NAME].rstrip("_")


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is", "ies")) else word


def is_valid(name: str) -> bool:
    """Whether OpenAI's schema and Python accept the name."""
    return bool(NAME.fullmatch(name)) and not keyword.iskeyword(name)
