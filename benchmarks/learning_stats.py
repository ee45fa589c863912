"""Statistics of the learning study: means over seeds with 95 % intervals, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds with the 95 % interval of Student's t; `low` and `high` are NaN for one seed."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Mean and 95 % interval of the mean by Student's t; NaN for the ends of a single value."""
        x = np.asarray(values, np.float64)
        if len(x) < 2:
            return cls(float(x.mean()) if len(x) else math.nan, math.nan, math.nan, len(x))
        half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
        return cls(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))

    def text(self, sign: bool = False) -> str:
        """`0.62 [0.50, 0.74]`; without the brackets for one seed. `sign`: +0.12 [+0.02, +0.22]."""
        form = "+.2f" if sign else ".2f"
        if math.isnan(self.low):
            return format(self.mean, form)
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Paired:
    """Differences a − b on the seeds that both have. p: two-sided paired t-test; NaN where it is undefined."""

    difference: Interval
    p: float

    @classmethod
    def of(cls, a: Mapping[int, float], b: Mapping[int, float]) -> Paired:
        """From values by seed."""
        seeds = sorted(a.keys() & b.keys())
        values = np.array([a[seed] - b[seed] for seed in seeds])
        interval = Interval.of(values)
        if len(values) < 2 or np.ptp(values) == 0:
            return cls(interval, math.nan)
        t = values.mean() / (values.std(ddof=1) / math.sqrt(len(values)))
        return cls(interval, float(2 * stats.t.sf(abs(t), len(values) - 1)))
