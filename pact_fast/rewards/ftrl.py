"""FTRL's solve-P, solve-R and solve-F1 (docs/method.md, section 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pact_fast.data.types import Task, Trajectory
from pact_fast.rewards.feedback import Feedback, normalise, stated


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
    text, parts = normalise(text), expected_parts(expected)
    return bool(parts) and all(part in text for part in parts)


def expected_parts(expected: str) -> list[str]:
    """The parts of an expected text, normalised, without empty ones."""
    return [part for part in map(normalise, expected.split(", ")) if part]


def solve_score(feedback: Sequence[Feedback], expected: Mapping[str, Sequence[str]]) -> SolveScore:
    """Score the calls of a trajectory. Each call solves the first open sub-question of its tool that it answers, only.

    A call answers a sub-question if its tool states every part of the expected text (`feedback.stated`).

    Args:
        feedback: Every call, in order.
        expected: For each tool, the texts that its observations must contain: one text per sub-question, at least one
            in total. An empty text is not a sub-question.
    """
    parts = {name: [found for text in texts if (found := expected_parts(text))] for name, texts in expected.items()}
    statements = {part: stated(feedback, part) for texts in parts.values() for text in texts for part in text}
    return _score(feedback, parts, lambda call, text: all(statements[part][call] for part in text))


def official_solve_score(feedback: Sequence[Feedback], expected: Mapping[str, Sequence[str]]) -> SolveScore:
    """`solve_score` as FTRL's authors compute it: every observation is searched, errors and echoes included.

    For comparison with published numbers; a policy that is trained on it learns to put guesses into arguments.
    """
    parts = {name: [list(map(normalise, text.split(", "))) for text in texts] for name, texts in expected.items()}
    texts = [normalise(call.observation) for call in feedback]
    return _score(feedback, parts, lambda call, text: all(part in texts[call] for part in text))


def _score(
    feedback: Sequence[Feedback], parts: dict[str, list[list[str]]], answers: Callable[[int, list[str]], bool]
) -> SolveScore:
    """`answers(i, text)`: whether the i-th call answers a sub-question, given by the parts of its expected text."""
    questions, solved = sum(map(len, parts.values())), 0
    for i, call in enumerate(feedback):
        open_questions = parts.get(call.tool, [])
        hit = next((text for text in open_questions if answers(i, text)), None)
        if hit is not None:
            open_questions.remove(hit)
            solved += 1
    return SolveScore(solved, len(feedback), questions)


def ftrl_reward(task: Task, trajectory: Trajectory) -> float | None:
    """FTRL's training reward (arXiv 2508.08791) of a whole trajectory: solve-F1, or a penalty.

    −0.3 if every call is malformed, −0.5 without any call and any answer. None where the environment gives no `solve_f1`
    (`env_args.scoring: ftrl`). The authors reward single turns, with F1 = 2·solved/(calls + 1).
    """
    if "solve_f1" not in trajectory.env_rewards:
        return None
    attempts = [attempt for turn in trajectory.turns for attempt in turn.attempts]
    if attempts and not trajectory.calls:
        return -0.3
    if not attempts and not trajectory.answer.strip():
        return -0.5
    return trajectory.env_rewards["solve_f1"]
