"""pass@1, pass^k and percentile bootstrap intervals, over tasks with several samples each."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Literal

import numpy as np

RESAMPLES = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its 95 % bootstrap interval [low, high]."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 6) for name, value in asdict(self).items()}


def pass_hat_k(successes: int, samples: int, k: int) -> float:
    """pass^k of one task: the probability that k of its samples, drawn without replacement, all succeed.

    C(c, k) / C(n, k) (τ-bench, arXiv 2406.12045). ValueError unless 1 ≤ k ≤ samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass^{k} needs 1 to {samples} samples")
    return comb(successes, k) / comb(samples, k)


def resampled_means(values: Sequence[float], name: str) -> np.ndarray:
    """[RESAMPLES] means of `values` [n] drawn with replacement. Equal `name` and n: the same draws, so metrics are paired."""
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    means = np.empty(RESAMPLES)
    step = max(1, 2_000_000 // max(len(data), 1))  # rows of indices at once: 16 MB
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        means[start : start + rows] = data[generator.integers(0, len(data), (rows, len(data)))].mean(axis=1)
    return means


def estimate(values: Mapping[str, Sequence[float]], by: Literal["category", "task"] = "category") -> Estimate:
    """The average over categories.

    Tasks are drawn within each category, since the benchmark fixes how many a category has.

    Args:
        values: Category → one value per task; none is empty.
        by: `category`: the mean of the categories' means; `task`: every task counts the same.
    """
    sizes = np.array([len(column) for column in values.values()], dtype=np.float64)
    weights = sizes / sizes.sum() if by == "task" else np.full(len(sizes), 1 / len(sizes))
    mean = float(weights @ [float(np.mean(column)) for column in values.values()])
    draws = weights @ np.stack([resampled_means(column, name) for name, column in values.items()])
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high))
