"""Base model against trained model: success rates, their difference, and what may be concluded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pact_fast.report.run_data import number


@dataclass(frozen=True)
class Rate:
    """A success rate in [0, 1], or a difference of two in [-1, 1], with the ends of its 95 % interval if known."""

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def read(cls, value: Any) -> Rate | None:
        """From summary.json: {"mean", "low", "high", "n"} or a bare number; None for anything else."""
        fields = value if isinstance(value, dict) else {"mean": value}
        mean, low, high, n = (number(fields.get(key)) for key in ("mean", "low", "high", "n"))
        if mean is None:
            return None
        if low is None or high is None:
            low = high = None
        return cls(mean, low, high, None if n is None else int(n))


@dataclass(frozen=True)
class Comparison:
    """One way of evaluating, before and after training."""

    label: str
    base: Rate | None
    trained: Rate | None

    @property
    def change(self) -> Rate | None:
        """trained - base, with Newcombe's interval made from the two intervals (Statistics in Medicine 17, 1998, method 10).

        It takes the two evaluations as independent. They use the same tasks, so it is rather too wide than too narrow.
        """
        a, b = self.base, self.trained
        if a is None or b is None:
            return None
        change = b.mean - a.mean
        if a.low is None or a.high is None or b.low is None or b.high is None:
            return Rate(change)
        return Rate(
            change,
            change - math.hypot(b.mean - b.low, a.high - a.mean),
            change + math.hypot(b.high - b.mean, a.mean - a.low),
        )

    @property
    def verdict(self) -> str:
        """One sentence; '' if there is nothing to compare."""
        change = self.change
        if self.base is None or self.trained is None or change is None:
            return ""
        start = f"{self.label} success"
        ends = f"from {percent(self.base.mean)} to {percent(self.trained.mean)}"
        if change.low is None or change.high is None:
            return f"{start} went {ends}, {points(change.mean)} points; without intervals this may be chance."
        interval = f"95 % interval {points(change.low)} to {points(change.high)}"
        if self.sign == 0:
            return f"{start} went {ends}, {points(change.mean)} points, which may be chance ({interval})."
        return f"{start} {'rose' if self.sign > 0 else 'fell'} {ends}, {points(change.mean)} points ({interval})."

    @property
    def sign(self) -> int:
        """1 or -1 if the interval of the change leaves out zero, else 0."""
        change = self.change
        if change is None or change.low is None or change.high is None:
            return 0
        return (change.low > 0) - (change.high < 0)


def comparisons(summary: dict[str, Any]) -> list[Comparison]:
    """The comparisons of which summary.json has at least one side."""
    pairs = [("Sampled", "base_success", "success"), ("Greedy", "base_greedy", "greedy")]
    found = [Comparison(label, Rate.read(summary.get(a)), Rate.read(summary.get(b))) for label, a, b in pairs]
    return [c for c in found if c.base or c.trained]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Percentage points with a sign, and a real minus."""
    return f"{100 * value:+.1f}".replace("-", "−")


def interval(rate: Rate | None) -> str:
    """The 95 % interval of a rate in per cent, '' if unknown."""
    if rate is None or rate.low is None or rate.high is None:
        return ""
    return f"{100 * rate.low:.1f} – {100 * rate.high:.1f}"
