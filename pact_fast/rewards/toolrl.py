"""ToolRL's reward (arXiv 2504.13958): format, and correctness of names, argument names and argument values of the calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from pact_fast.data.types import Task, ToolCall, Trajectory
from pact_fast.rewards.matching import json_equal


def toolrl_reward(task: Task, trajectory: Trajectory) -> float:
    """Format, 0 or 1, plus correctness, −3 … 3, of all calls of a trajectory; correctness is 0 without reference calls.

    The paper rewards one response of a turn. Here a trajectory is rewarded as a whole: its calls against all reference
    calls (`task.reference_calls`, or those of the expert trace).
    """
    reference = task.reference_calls
    if reference is None and task.expert is not None:
        reference = task.expert.calls
    return float(well_formed(trajectory)) + (correctness(trajectory.calls, reference) if reference else 0.0)


def well_formed(trajectory: Trajectory) -> bool:
    """Whether all calls could be read, and an answer that is not empty, not a limit, ended the trajectory."""
    return not any(turn.errors for turn in trajectory.turns) and bool(trajectory.answer.strip())


def correctness(predicted: Sequence[ToolCall], reference: Sequence[ToolCall]) -> float:
    """6·R/S − 3 with R = names + Σ over matched calls of (argument names + equal values) and S the largest possible R.

    names: Jaccard index of the multisets of tool names. Argument names of a pair: their Jaccard index. Calls are matched
    one to one with reference calls of the same tool so that R is largest. S = 1 + number of reference calls + number of
    their arguments. Equal calls, in any order, have 3, and none −3.
    """
    names, wanted = Counter(call.name for call in predicted), Counter(call.name for call in reference)
    names_score = (names & wanted).total() / max((names | wanted).total(), 1)
    table = np.array([[pair_score(p, r) for r in reference] for p in predicted]).reshape(len(predicted), len(reference))
    total = names_score + float(table[linear_sum_assignment(table, maximize=True)].sum())
    largest = 1 + len(reference) + sum(len(call.arguments) for call in reference)
    return 6.0 * total / largest - 3.0


def pair_score(predicted: ToolCall, reference: ToolCall) -> float:
    """Jaccard index of the argument names, 1 without any, plus the number of equal values; 0 for different tools."""
    if predicted.name != reference.name:
        return 0.0
    got, want = predicted.arguments, reference.arguments
    union = got.keys() | want.keys()
    keys = len(got.keys() & want.keys()) / len(union) if union else 1.0
    return keys + sum(json_equal(got[key], want[key]) for key in got.keys() & want.keys())
