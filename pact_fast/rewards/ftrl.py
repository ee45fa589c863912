"""FTRL's solve-P, solve-R and solve-F1 (method, section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SolveScore:
    """`solved` sub-questions of `questions` (at least one), with `calls` tool calls. A call solves one at most."""

    solved: int
    calls: int
    questions: int

    @property
    def precision(self) -> float:
        return self.solved / self.calls if self.calls else 1.0

    @property
    def recall(self) -> float:
        return self.solved / self.questions

    @property
    def f1(self) -> float:
        return 2 * self.solved / (self.calls + self.questions)


def mentions(expected: str, text: str) -> bool:
    """Whether every part of `expected` occurs in `text`, both in lower case and without commas.

    Parts are separated by a comma and a space: "3,776 m, Mount Fuji" has two.
    """
    text = _plain(text)
    return all(_plain(part) in text for part in expected.split(", "))


def solve_score(feedback: Iterable[tuple[str, str]], expected: Mapping[str, Sequence[str]]) -> SolveScore:
    """Score the calls of a trajectory.

    feedback  (tool name, observation) of every call, in order; the name of a malformed call is ""
    expected  what the observations of each tool must mention, one text per sub-question

    Each call takes the first open sub-question of its tool that it solves, and no other.
    """
    open_questions = {name: list(texts) for name, texts in expected.items()}
    questions = sum(map(len, open_questions.values()))
    solved = calls = 0
    for name, observation in feedback:
        calls += 1
        texts = open_questions.get(name, [])
        hit = next((text for text in texts if mentions(text, observation)), None)
        if hit is not None:
            texts.remove(hit)
            solved += 1
    return SolveScore(solved, calls, questions)


def _plain(text: str) -> str:
    return text.lower().replace(",", "").strip()
