"""FTRL's solve-P, solve-R and solve-F1 (docs/method.md, section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SolveScore:
    """Score of a trajectory.

    solved     sub-questions solved
    calls      tool calls made; each solves one sub-question at most
    questions  sub-questions of the task, at least one
    """

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


def contains_parts(text: str, expected: str) -> bool:
    """Whether every part of `expected` occurs in `text`, both in lower case and without commas.

    Parts are separated by a comma and a space: "3,776 m, Mount Fuji" has two. A text without parts occurs nowhere; in
    the official scoring it occurs everywhere.
    """
    text, parts = _normalise(text), expected_parts(expected)
    return bool(parts) and all(part in text for part in parts)


def expected_parts(expected: str) -> list[str]:
    """The parts of an expected text, normalised, without empty ones."""
    return [part for part in map(_normalise, expected.split(", ")) if part]


def solve_score(feedback: Iterable[tuple[str, str]], expected: Mapping[str, Sequence[str]]) -> SolveScore:
    """Score the calls of a trajectory. Each call solves the first open sub-question of its tool that it answers, only.

    Args:
        feedback: (tool name, observation) of every call, in order; the name of a malformed call is "".
        expected: For each tool, the texts that its observations must contain: one text per sub-question, at least one
            in total. An empty text is no sub-question.
    """
    open_questions = {name: [text for text in texts if expected_parts(text)] for name, texts in expected.items()}
    questions = sum(map(len, open_questions.values()))
    solved = calls = 0
    for name, observation in feedback:
        calls += 1
        texts = open_questions.get(name, [])
        hit = next((text for text in texts if contains_parts(observation, text)), None)
        if hit is not None:
            texts.remove(hit)
            solved += 1
    return SolveScore(solved, calls, questions)


def _normalise(text: str) -> str:
    return text.lower().replace(",", "").strip()
