"""The learning rate of a method in a regime, from its runs on validation tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def tried_rates(records: Iterable[dict[str, Any]], regime: str, method: str) -> tuple[float, ...]:
    """Learning rates with a result on validation tasks, in ascending order."""
    return tuple(sorted(_scores(records, regime, method)))


def best_rate(records: Iterable[dict[str, Any]], regime: str, method: str, rates: tuple[float, ...]) -> float | None:
    """The learning rate with the most success on validation tasks, the lower one of two equals; None: some were not run."""
    scores = _scores(records, regime, method)
    if not rates or not all(rate in scores for rate in rates):
        return None
    return max(rates, key=lambda rate: (scores[rate], -rate))


def _scores(records: Iterable[dict[str, Any]], regime: str, method: str) -> dict[float, float]:
    return {
        record["learning_rate"]: record["curve"][-1]["sampled"]
        for record in records
        if (record["regime"], record["method"], record["part"]) == (regime, method, "validation")
    }
