"""ToolHop's answer correctness (method, section 7)."""

from __future__ import annotations

from pact_fast.data.types import Trajectory
from pact_fast.rewards.ftrl import mentions


def is_correct(gold: str, trajectory: Trajectory) -> bool:
    """Whether the gold answer's parts all occur in the final answer, or all in the tool message just before it.

    A trajectory that did not end with an answer, or with an empty one, is wrong.
    """
    if not trajectory.answer:
        return False
    before = trajectory.turns[-2].observations if len(trajectory.turns) > 1 else []
    return any(mentions(gold, text) for text in (trajectory.answer, *before[-1:]))
