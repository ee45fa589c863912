"""Exact match and F1 of short answers, by the rules of the multi-hop question-answering sets.

All sets share one normal form: lower case, without the characters of `string.punctuation`, without the words a, an and
the, white space collapsed. Other punctuation stays, and so do accents. It is another form than that of `answers`, which
drops no articles, and all symbols.

F1 is that of the multisets of words. It differs where nothing is common:

- HotpotQA (hotpot_evaluate_v1.py) and 2WikiMultiHopQA (2wikimultihop_evaluate_v1.1.py): 0 if one side is yes, no or
  noanswer and the other is another answer; 0 if no word is common, so also of two empty answers.
- MuSiQue (metrics/answer.py): of an empty answer 1 if both are empty, else 0; no rule for yes and no.
- Bamboogle: no F1 is official; MuSiQue's.

Every set takes the best of all accepted answers, for exact match and F1 apart.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

QaSet = Literal["hotpotqa", "2wikimultihopqa", "musique", "bamboogle"]
CLOSED = {"yes", "no", "noanswer"}  # answers that are right or wrong as a whole, in the sets that say so
_CLOSED_SETS = {"hotpotqa", "2wikimultihopqa"}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """The normal form in which the sets compare answers."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def qa_exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction equals one of the accepted answers in the normal form."""
    got = normalize_answer(prediction)
    return any(got == normalize_answer(answer) for answer in answers)


def qa_f1(prediction: str, answers: Sequence[str], qa_set: QaSet) -> float:
    """F1 in [0, 1] of the prediction and the accepted answer that it is closest to; 0 if there is none."""
    one = _f1_closed if qa_set in _CLOSED_SETS else _f1
    got = normalize_answer(prediction)
    return max((one(got, normalize_answer(answer)) for answer in answers), default=0.0)


def qa_scores(prediction: str | None, answers: Sequence[str], qa_set: QaSet) -> dict[str, float]:
    """{"em", "f1"} of a prediction, each in [0, 1]; a missing prediction (None) counts 0."""
    if prediction is None:
        return {"em": 0.0, "f1": 0.0}
    return {"em": float(qa_exact_match(prediction, answers)), "f1": qa_f1(prediction, answers, qa_set)}


def _f1(got: str, want: str) -> float:
    """SQuAD's F1 of two normal forms."""
    a, b = got.split(), want.split()
    if not a or not b:
        return float(a == b)
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b))


def _f1_closed(got: str, want: str) -> float:
    """HotpotQA's F1 of two normal forms."""
    if got != want and (got in CLOSED or want in CLOSED):
        return 0.0
    return _f1(got, want) if got or want else 0.0
