"""Similarity of tool calls, and their assignment to reference calls (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from pact_fast.data.types import ToolCall


def similarity(predicted: ToolCall, reference: ToolCall) -> float:
    """S in [0, 1]: 0 if the names differ, else (1 + J(keys) + #{k: equal value}) / (2 + #reference arguments).

    J is the Jaccard index of the top-level argument names; two calls without arguments have J = 1. (The method defines J
    on multisets; names of a JSON object are distinct, so J is the ordinary index.) Values are compared by `json_equal`.
    S = 1 if and only if the calls are equal.
    """
    if predicted.name != reference.name:
        return 0.0
    got, want = predicted.arguments, reference.arguments
    shared = got.keys() & want.keys()
    union = len(got.keys() | want.keys())
    jaccard = len(shared) / union if union else 1.0
    equal = sum(json_equal(got[key], want[key]) for key in shared)
    return (1 + jaccard + equal) / (2 + len(want))


def match(predicted: Sequence[ToolCall], reference: Sequence[ToolCall], penalty: float = 0.0) -> np.ndarray:
    """Score of every predicted call, float64 [len(predicted)], under the one-to-one assignment that maximises Σ S.

    A matched call earns its similarity; an unmatched one, or one paired with S = 0, earns −penalty. Calls with equal
    names have S > 0, so the assignment also matches as many calls as possible, and the penalty does not change it.
    """
    scores = np.full(len(predicted), 0.0 - penalty)  # not -penalty: that is -0.0 by default
    table = np.array([[similarity(p, r) for r in reference] for p in predicted])
    table = table.reshape(len(predicted), len(reference))  # a side may be empty
    for i, j in zip(*linear_sum_assignment(table, maximize=True), strict=True):
        if table[i, j] > 0:
            scores[i] = table[i, j]
    return scores


def json_equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: numbers by value (1 equals 1.0), all others by type and value.

    Unlike in Python, true is not equal to 1. Strings are neither trimmed nor lower-cased.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(json_equal(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
