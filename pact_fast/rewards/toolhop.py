"""ToolHop's answer correctness (docs/method.md, section 7)."""

from __future__ import annotations

from pact_fast.data.types import Trajectory
from pact_fast.rewards.feedback import stated, trajectory_feedback
from pact_fast.rewards.ftrl import contains_parts, expected_parts


def is_correct(gold: str, trajectory: Trajectory) -> bool:
    """Whether all parts of the gold answer occur in the final answer, or the last tool before it states all of them.

    A trajectory without a final answer, or with an empty one, is wrong; so is every answer to an empty gold answer. As in
    ToolHop's own scoring, parts are substrings: the gold answer 42 occurs in "420". Errors, and parts that the tool only
    repeats from its arguments, state nothing (`feedback.stated`).
    """
    parts = expected_parts(gold)
    if not trajectory.answer or not parts:
        return False
    if contains_parts(trajectory.answer, gold):
        return True
    feedback = trajectory_feedback(trajectory)
    if not feedback or feedback[-1].turn != len(trajectory.turns) - 2:  # the turn before has no observation
        return False
    return all(stated(feedback, part)[-1] for part in parts)


def official_is_correct(gold: str, trajectory: Trajectory) -> bool:
    """`is_correct` as ToolHop's own script computes it: the whole gold answer, searched in the last message and the tool
    message before it.

    Commas are removed from the texts and not from the gold answer, and trailing zeros and full stops from both: a gold
    answer with a comma is never found, 10 is found in 1, and 0 everywhere. A last turn that was cut counts as it stands.
    """
    last = trajectory.turns[-1] if trajectory.turns else None
    if last is None or last.attempts or not last.content:
        return False
    before = trajectory.turns[-2].observations[-1:] if len(trajectory.turns) > 1 else []
    sought = gold.rstrip(".0").lower()
    return any(sought in text.rstrip(".0").replace(",", "").lower() for text in (last.content, *before))
