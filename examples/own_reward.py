"""A reward function: keyword arguments as in TRL, one number (or None: no opinion) per completion.

    pact-fast train quickstart algorithm.reward.functions=[examples/own_reward.py:short_answer]

More in docs/rewards.md.
"""

from __future__ import annotations

from typing import Any


def short_answer(
    completions: list[list[dict[str, Any]]], answer: list[str | None], **kwargs: Any
) -> list[float | None]:
    """1 for a right answer of at most ten words; no opinion on tasks without a reference answer.

    Args:
        completions: Messages after the prompt, one list per rollout.
        answer: Reference answers.
        **kwargs: `prompts`, `completion_ids`, and every further column of the data rows.
    """
    scores: list[float | None] = []
    for messages, reference in zip(completions, answer, strict=True):
        if reference is None:
            scores.append(None)
            continue
        words = messages[-1]["content"].split()
        scores.append(float(reference in words and len(words) <= 10))
    return scores
