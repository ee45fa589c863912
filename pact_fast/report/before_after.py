"""Base model against trained model: success rates, their difference with an interval, and a verdict in a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pact_fast.report.run_data import number

FILTERS_OFF = {"top_p": "1", "top_k": "0", "min_p": "0"}  # values with which a filter keeps all tokens


@dataclass(frozen=True)
class Rate:
    """A success rate in [0, 1] or a difference of two in [-1, 1]. `ends`: its 95 % interval, if known; n: trials."""

    mean: float
    ends: tuple[float, float] | None = None
    n: int | None = None

    @classmethod
    def read(cls, value: Any) -> Rate | None:
        """From a value of summary.json: {"mean", "low", "high", "n"} or a number. None for anything else."""
        fields = value if isinstance(value, dict) else {"mean": value}
        mean, low, high, n = (number(fields.get(key)) for key in ("mean", "low", "high", "n"))
        if mean is None:
            return None
        return cls(mean, None if low is None or high is None else (low, high), None if n is None else int(n))

    def interval(self, form: Callable[[float], str]) -> str:
        """`21.0 to 29.4`, '' if unknown. `form` formats a number."""
        return " to ".join(form(end).removesuffix("\u00a0%") for end in self.ends) if self.ends else ""


@dataclass(frozen=True)
class Comparison:
    """One kind of evaluation (sampled or greedy), before and after training. `conditions`: how it sampled, in words."""

    label: str
    base: Rate | None
    trained: Rate | None
    conditions: str = ""

    @property
    def change(self) -> Rate | None:
        """trained − base with Newcombe's interval, computed from the two Wilson intervals.

        R. G. Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10, for independent samples. Both evaluations use
        the same tasks, so the interval is conservative.
        """
        a, b = self.base, self.trained
        if a is None or b is None:
            return None
        change = b.mean - a.mean
        if a.ends is None or b.ends is None:
            return Rate(change)
        low = change - math.hypot(b.mean - b.ends[0], a.ends[1] - a.mean)
        high = change + math.hypot(b.ends[1] - b.mean, a.mean - a.ends[0])
        return Rate(change, (low, high))

    @property
    def sign(self) -> int:
        """1 or -1 if the interval of the change excludes zero, else 0."""
        if self.change is None or self.change.ends is None:
            return 0
        low, high = self.change.ends
        return (low > 0) - (high < 0)

    @property
    def verdict(self) -> str:
        """The comparison in one sentence; '' if a side is missing."""
        change = self.change
        if self.base is None or self.trained is None or change is None:
            return ""
        verb = {1: "rose", 0: "went", -1: "fell"}[self.sign]
        start = f"{self.label} success {verb} from {percent(self.base.mean)} to {percent(self.trained.mean)}"
        by = f"{points(change.mean)} points"
        if change.ends is None:
            return f"{start}, {by}; without intervals this may be chance."
        chance = "" if self.sign else ", which may be chance"
        return f"{start}, {by}{chance} (95\u00a0% interval {change.interval(points)})."


def comparisons(summary: dict[str, Any]) -> list[Comparison]:
    """Comparisons of which summary.json has at least one side."""
    keys = [("Sampled", "base_success", "success"), ("Greedy", "base_greedy", "greedy")]
    both = [
        Comparison(
            label, Rate.read(summary.get(a)), Rate.read(summary.get(b)), _conditions(summary.get(a), summary.get(b))
        )
        for label, a, b in keys
    ]
    return [comparison for comparison in both if comparison.base or comparison.trained]


def _conditions(*sides: Any) -> str:
    """`temperature 1, top-p 0.9, 250 samples`, as far as the summaries say. Values that differ are both named."""
    given = [side for side in sides if isinstance(side, dict)]
    temperatures = _distinct(side.get("temperature") for side in given)
    counts = _distinct(side.get("n") for side in given)
    parts = [f"temperature {temperatures}", *_filters(given)] if temperatures not in ("", "0") else []
    return ", ".join([*parts, *([f"{counts} samples"] if counts else [])])


def _filters(sides: list[dict[str, Any]]) -> list[str]:
    """`top-p 0.9`, … for the filters that an evaluation sampled with; `unfiltered` if it says that there were none."""
    values = {key: _distinct(side.get(key) for side in sides) for key in FILTERS_OFF}
    names = [f"{key.replace('_', '-')} {value}" for key, value in values.items() if value not in ("", FILTERS_OFF[key])]
    return names or (["unfiltered"] if any(values.values()) else [])


def _distinct(values: Iterable[Any]) -> str:
    """The different numbers of a list, in order: `250`, or `200 and 250`."""
    numbers = [value for value in map(number, values) if value is not None]
    return " and ".join(f"{value:g}" for value in dict.fromkeys(numbers))


def percent(value: float) -> str:
    """`61.0 %`, with a non-breaking space."""
    return f"{100 * value:.1f}\u00a0%"


def points(value: float) -> str:
    """Percentage points with a sign; a minus sign, not a hyphen."""
    return f"{100 * value:+.1f}".replace("-", "−")
