"""ToolHop's answer correctness (docs/method.md, section 7)."""

from __future__ import annotations

from pact_fast.data.types import Trajectory
from pact_fast.rewards.ftrl import contains_parts


def is_correct(gold: str, trajectory: Trajectory) -> bool:
    """Whether all parts of the gold answer occur in the final answer, or all in the last tool message before it.

    A trajectory without a final answer, or with an empty one, is wrong; so is every answer to an empty gold answer. As in
    ToolHop's own scoring, parts are substrings: the gold answer 42 occurs in "420".
    """
    if not trajectory.answer:
        return False
    before = trajectory.turns[-2].observations if len(trajectory.turns) > 1 else []
    return any(contains_parts(text, gold) for text in (trajectory.answer, *before[-1:]))
