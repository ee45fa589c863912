"""BM25 over the few passages of a row (Robertson and Zaragoza 2009; the IDF of Lucene, which is never negative)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

K1, B = 1.2, 0.75
_WORD = re.compile(r"\w+")


class BM25:
    """Ranks texts. Ties are broken by position, so that equal queries give equal orders everywhere."""

    def __init__(self, texts: Sequence[str]):
        self._counts = [Counter(words(text)) for text in texts]
        lengths = [counts.total() for counts in self._counts]
        mean = (sum(lengths) / len(lengths) if lengths else 0.0) or 1.0
        self._norms = [K1 * (1 - B + B * length / mean) for length in lengths]
        documents = Counter(word for counts in self._counts for word in counts)
        n = len(self._counts)
        self._idf = {word: math.log(1 + (n - df + 0.5) / (df + 0.5)) for word, df in documents.items()}

    def scores(self, query: str) -> list[float]:
        """The score of every text; a word that occurs twice in the query counts twice."""
        asked = words(query)
        return [
            sum(self._idf[w] * counts[w] * (K1 + 1) / (counts[w] + norm) for w in asked if w in counts)
            for counts, norm in zip(self._counts, self._norms, strict=True)
        ]

    def top(self, query: str, k: int) -> list[int]:
        """Positions of the `k` best texts with a positive score, best first."""
        scores = self.scores(query)
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return [i for i in ranked[:k] if scores[i] > 0]


def words(text: str) -> list[str]:
    """The words of a text, case-folded, in their order."""
    return _WORD.findall(text.casefold())
