"""Curves of a run as SVG geometry. SPECS lists the panels and the metrics that they show; page.html draws them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 304, 8, 128  # the plotting area
MAX_POINTS = 240  # per series; more cannot be seen at this width

Metrics = Sequence[dict[str, Any]]
Column = list[float | None]
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Spec:
    """A panel.

    section     heading above it
    title       title
    keys        metric name → legend label. A star in a name matches anything but a slash; an empty label stands for the
                text that the star matched
    percent     show values as percentages
    full_scale  axis from 0 to 1
    stacked     series are layers
    exact       no smoothing: a schedule has no noise
    band        metric that is the half-width of a band around the first series
    exclude     names that a star must not match
    unit        unit of the axis
    """

    section: str
    title: str
    keys: dict[str, str]
    percent: bool = False
    full_scale: bool = False
    stacked: bool = False
    exact: bool = False
    band: str = ""
    exclude: tuple[str, ...] = ()
    unit: str = ""


SPECS = (
    Spec(
        "Learning",
        "Success",
        {"success": "training", "eval/success": "held-out", "eval/greedy": "held-out, greedy"},
        percent=True,
        full_scale=True,
    ),
    Spec("Learning", "Reward, mean ± std", {"reward/mean": "mean"}, band="reward/std"),
    Spec(
        "Learning",
        "Reward parts",
        {"reward/*": ""},
        exclude=(
            "reward/mean",
            "reward/std",
            "reward/success",
            "reward/zero_advantage_groups",
            "reward/zero_advantage_tokens",
        ),
    ),
    Spec(
        "Learning",
        "Groups without advantages",
        {"reward/zero_advantage_groups": "fraction"},
        percent=True,
        full_scale=True,
    ),
    Spec(
        "Optimisation",
        "Loss",
        {"loss": "total", "*/loss_rl": "", "expert/loss_sft": "SFT"},
    ),
    Spec("Optimisation", "Entropy", {"*/entropy": ""}, unit="nats"),
    Spec("Optimisation", "Approximate KL", {"*/approx_kl": ""}, unit="nats"),
    Spec("Optimisation", "Clipped tokens", {"*/clip_fraction": ""}, percent=True),
    Spec(
        "Optimisation",
        "Log-prob difference of contexts, mean ± std",
        {"trace/logprob_diff": "mean"},
        band="trace/logprob_diff_std",
        unit="nats",
    ),
    Spec("Optimisation", "Effective sample size", {"*/ess_fraction": ""}, percent=True, full_scale=True),
    Spec("Optimisation", "Gradient norm", {"grad_norm": "before clipping"}),
    Spec("Optimisation", "Control-token probability", {"control_token_prob": "mean"}),
    Spec(
        "Behaviour",
        "Completion length",
        {"lengths/completion_mean": "completion", "lengths/sampled_mean": "sampled"},
        unit="tokens",
    ),
    Spec("Behaviour", "Turns and calls", {"turns/mean": "turns", "tools/calls_mean": "calls"}, unit="per rollout"),
    Spec("Behaviour", "Stop reasons", {"stop/*": ""}, percent=True, full_scale=True, stacked=True),
    Spec("Behaviour", "Malformed calls", {"tools/malformed_fraction": "fraction"}, percent=True),
    Spec("Speed", "Time per step", {"time/*": ""}, exclude=("time/step",), stacked=True, unit="s"),
    Spec("Speed", "Throughput", {"tokens_per_second": "tokens/s"}),
    Spec("Schedule", "Learning rate", {"learning_rate": "rate"}, exact=True),
    Spec("Schedule", "SFT weight λ of calls", {"schedule/sft_lambda": "λ"}, exact=True),
    Spec("Schedule", "Reasoning level", {"schedule/reasoning_level": "level"}, exact=True),
)


@dataclass
class Line:
    """A drawn series.

    label  legend label
    texts  value at every step of the panel, as the readout shows it
    path   the curve, as SVG path data
    raw    the unsmoothed curve behind it
    area   a filled band or layer
    dots   (x, y) of points to mark
    """

    label: str
    texts: list[str | None]
    path: str = ""
    raw: str = ""
    area: str = ""
    dots: list[tuple[float, float]] = field(default_factory=list)

    @property
    def last(self) -> str:
        """The newest value as text."""
        return next((text for text in reversed(self.texts) if text is not None), "–")


@dataclass
class Panel:
    """A drawn panel: lines, axis ticks (position, text), and the step and x position of every record."""

    spec: Spec
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    steps: list[int]
    xs: list[float]

    @property
    def readout(self) -> dict[str, Any]:
        """Data with which the page shows values under the pointer."""
        return {"steps": self.steps, "x": self.xs, "texts": [line.texts for line in self.lines]}


def panels(metrics: Metrics) -> list[Panel]:
    """Panels that have data, in the order of SPECS."""
    drawn = (_draw(spec, _thin(metrics)) for spec in SPECS)
    return [panel for panel in drawn if panel]


def _draw(spec: Spec, metrics: Metrics) -> Panel | None:
    labels = _labels(spec, metrics)
    rows = [row for row in metrics if any(key in row for key in labels)]
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    columns = {key: [row.get(key) for row in rows] for key in labels}
    if spec.stacked:
        columns = {key: [value or 0.0 for value in column] for key, column in columns.items()}
    x = _scale(steps[0], steps[-1], LEFT, RIGHT)
    xs = [round(x(step), 1) for step in steps]
    lower, upper = _edges(spec, rows, columns)
    y_values = _axis([v for column in (*lower, *upper) for v in column if v is not None], spec.full_scale)
    y = _scale(y_values[0], y_values[-1], BOTTOM, TOP)

    lines = []
    for index, (key, column) in enumerate(columns.items()):
        line = Line(labels[key], [None if v is None else format_value(v, spec.percent) for v in column])
        if spec.stacked or spec.band:
            line.area = _area(xs, lower[index], upper[index], y)
        if not spec.stacked:
            _add_curve(line, xs, column, y, smooth=not spec.exact)
        lines.append(line)
    y_ticks = [(round(y(v), 1), format_value(v, spec.percent)) for v in y_values]
    x_ticks = [(round(x(v), 1), f"{v:,}") for v in _step_ticks(steps)]
    return Panel(spec, lines, x_ticks, y_ticks, steps, xs)


def _labels(spec: Spec, metrics: Metrics) -> dict[str, str]:
    """Metric key → legend label, in legend order."""
    keys = list(dict.fromkeys(key for row in metrics for key in row))
    labels: dict[str, str] = {}
    for pattern, label in spec.keys.items():
        regex = re.compile(re.escape(pattern).replace(r"\*", "([^/]+)"))
        for key in keys:
            match = regex.fullmatch(key)
            if match and key not in spec.exclude:
                labels[key] = label or match[1].replace("_", " ")
    return labels


def _edges(spec: Spec, rows: Metrics, columns: dict[str, Column]) -> tuple[list[Column], list[Column]]:
    """Lower and upper edge of every series: of its layer or band; without either, the curve itself."""
    values = list(columns.values())
    if spec.stacked:
        edges: list[Column] = [[0.0] * len(rows)]
        for column in values:
            edges.append([(a or 0.0) + (b or 0.0) for a, b in zip(edges[-1], column, strict=True)])
        return edges[:-1], edges[1:]
    if spec.band:
        half = [row.get(spec.band, 0.0) for row in rows]
        return [_shifted(column, half, -1) for column in values], [_shifted(column, half, 1) for column in values]
    return values, values


def _shifted(column: Column, by: list[float], sign: int) -> Column:
    return [None if v is None else v + sign * h for v, h in zip(column, by, strict=True)]


def _add_curve(line: Line, xs: list[float], column: Column, y: Scale, *, smooth: bool) -> None:
    known = [(x, v) for x, v in zip(xs, column, strict=True) if v is not None]
    points = [(x, round(y(v), 1)) for x, v in known]
    if len(known) <= max(12, len(xs) // 3):  # evaluations and short runs: mark the points
        line.dots = points
    window = len(known) // 12
    if smooth and window >= 3:
        line.raw = _path(points)
        means = _moving_mean([v for _, v in known], window)
        points = [(x, round(y(v), 1)) for (x, _), v in zip(known, means, strict=True)]
    line.path = _path(points)


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _area(xs: list[float], lower: Column, upper: Column, y: Scale) -> str:
    known = [(x, y(a), y(b)) for x, a, b in zip(xs, lower, upper, strict=True) if a is not None and b is not None]
    over = [(x, round(b, 1)) for x, _, b in known]
    under = [(x, round(a, 1)) for x, a, _ in reversed(known)]
    return _path(over + under) + "Z"


def _moving_mean(values: list[float], window: int) -> list[float]:
    """Centred moving mean; at the ends over the part of the window that exists."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _thin(metrics: Metrics) -> Metrics:
    """Means over blocks of consecutive steps, so that at most MAX_POINTS records remain."""
    size = math.ceil(len(metrics) / MAX_POINTS)
    if size <= 1:
        return metrics
    thinned = []
    for start in range(0, len(metrics), size):
        rows = metrics[start : start + size]
        record: dict[str, Any] = {}
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [row[key] for row in rows if key in row]
            record[key] = sum(values) / len(values)
        thinned.append(record | {"step": rows[-1]["step"]})
    return thinned


def _scale(a: float, b: float, start: float, end: float) -> Scale:
    """Linear map from [a, b] to [start, end]; constant in the middle if a = b."""
    if a == b:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - a) / (b - a) * (end - start)


def _axis(values: list[float], full_scale: bool) -> list[float]:
    """Round tick values that enclose the data, and zero if it is near."""
    if full_scale:
        return [0.0, 0.5, 1.0]
    low, high = min(values), max(values)
    if 0 <= low < 0.6 * high:
        low = 0.0
    if high - low <= 1e-9 * abs(high):  # one value, but for rounding
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    step = _round_step((high - low) / 3)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _step_ticks(steps: list[int]) -> list[int]:
    first, last = steps[0], steps[-1]
    if last - first < 2:
        return sorted({first, last})
    size = max(1, int(_round_step((last - first) / 4)))
    return [step for step in range(-(-first // size) * size, last + 1, size)]


def format_value(value: float, as_percent: bool = False) -> str:
    """Three significant digits, with a real minus."""
    if as_percent:
        text = f"{100 * value:.3g}\u00a0%"
    elif value and not 1e-3 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")
