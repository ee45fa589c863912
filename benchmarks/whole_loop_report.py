"""Numbers and tables of the whole-loop benchmark, from the records of its runs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import markdown, number
from benchmarks.whole_loop_phases import PHASES

SIDES = ("pact_fast", "trl")
CLOCKS = ("wall", "cpu")
SUM_LIMIT = 0.01  # relative, of a decomposition
CURVE_LIMIT = 0.15  # of success
GOAL = 2.0


def summary(report: dict[str, Any], threshold: float | None) -> dict[str, Any]:
    """Ratios of TRL to ours, time to the threshold by seed, milliseconds by phase."""
    pairs = paired(report)
    return {
        "step_ratio": {clock: quartiles(step_ratios(pairs, clock)) for clock in CLOCKS},
        "ms_per_step": {side: {clock: mean_step(report, side, clock) for clock in CLOCKS} for side in SIDES},
        "to_threshold": [to_threshold(report, *pair, threshold) for pair in pairs],
        "phases": {side: phase_times(report, side) for side in SIDES},
        "curve_difference": curve_difference(pairs),
    }


def paired(report: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(ours, TRL's) run of every seed that has both."""
    runs = {(run["side"], run["seed"]): run for run in report["runs"]}
    seeds = dict.fromkeys(run["seed"] for run in report["runs"])
    return [(runs[SIDES[0], s], runs[SIDES[1], s]) for s in seeds if all((side, s) in runs for side in SIDES)]


def durations(run: dict[str, Any], clock: str) -> list[float]:
    """Seconds of each step."""
    ends = [0.0, *(step[clock] for step in run["steps"])]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def step_ratios(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], clock: str) -> list[float]:
    """TRL's time over ours, of every step of every seed."""
    times = [(durations(ours, clock), durations(theirs, clock)) for ours, theirs in pairs]
    return [b / a for ours, theirs in times for a, b in zip(ours, theirs, strict=True)]


def mean_step(report: dict[str, Any], side: str, clock: str) -> float:
    """Milliseconds."""
    return 1e3 * statistics.mean(t for run in report["runs"] if run["side"] == side for t in durations(run, clock))


def phase_times(report: dict[str, Any], side: str) -> dict[str, dict[str, float]]:
    """Milliseconds per step by phase and clock."""
    runs = [run for run in report["runs"] if run["side"] == side]
    steps = sum(len(run["steps"]) for run in runs)
    return {
        phase: {clock: 1e3 * sum(run["phases"][phase][clock] for run in runs) / steps for clock in CLOCKS}
        for phase in PHASES
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def curve(report: dict[str, Any], run: dict[str, Any], clock: str) -> list[tuple[float, float]]:
    """(seconds of training, success) of the base and of each evaluation."""
    every = len(run["steps"]) // len(run["success"])
    times = [run["steps"][every * (point + 1) - 1][clock] for point in range(len(run["success"]))]
    return [(0.0, report["base"][str(run["seed"])]), *zip(times, run["success"], strict=True)]


def reached(points: Sequence[tuple[float, float]], threshold: float) -> float | None:
    """The time at which a curve first reaches `threshold`, linearly interpolated; None if it never does."""
    for (t0, s0), (t1, s1) in itertools.pairwise(points):
        if s1 >= threshold > s0:
            return t0 + (t1 - t0) * (threshold - s0) / (s1 - s0)
    return None


def to_threshold(
    report: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any], given: float | None
) -> dict[str, Any]:
    """Seconds of both sides to the success threshold of a seed, and their ratio; None where it is not reached."""
    start, lower = report["base"][str(ours["seed"])], min(ours["success"][-1], theirs["success"][-1])
    threshold = given if given is not None else (start + lower) / 2
    result: dict[str, Any] = {"seed": ours["seed"], "threshold": threshold}
    for clock in CLOCKS:
        times = [reached(curve(report, run, clock), threshold) for run in (ours, theirs)]
        ratio = times[1] / times[0] if times[0] and times[1] else None
        result[clock] = dict(zip((*SIDES, "ratio"), (*times, ratio), strict=True))
    return result


def curve_difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """Mean of TRL's success − ours over all evaluations."""
    return statistics.mean(b - a for x, y in pairs for a, b in zip(x["success"], y["success"], strict=True))


def threshold_ratio(found: dict[str, Any], clock: str) -> float | None:
    """Median over seeds of the ratio of the times to the threshold."""
    ratios = [row[clock]["ratio"] for row in found["to_threshold"] if row[clock]["ratio"]]
    return statistics.median(ratios) if ratios else None


def failures(report: dict[str, Any], *, quick: bool) -> list[str]:
    """Reasons for exit status 1, a line each."""
    found = report["summary"]
    lines = [
        f"{run['side']}, seed {run['seed']}: phases differ from the clock by {run['unexplained']:.1%}"
        for run in report["runs"]
        if run["unexplained"] > SUM_LIMIT
    ]
    if quick:
        return lines
    if abs(found["curve_difference"]) > CURVE_LIMIT:
        lines.append(
            f"the sides learn differently: success of TRL - ours is {found['curve_difference']:+.2f} on average"
        )
    ratio = threshold_ratio(found, "wall")
    if ratio is None or ratio < GOAL:
        lines.append(f"TRL's time to the threshold over ours is {number(ratio, '.2f') or 'unknown'}, at least {GOAL:g}")
    return lines


def tables(report: dict[str, Any]) -> str:
    return "\n\n".join([success_table(report), speed_table(report), phase_table(report)])


def success_table(report: dict[str, Any]) -> str:
    every = report["settings"]["steps"] // report["settings"]["points"]
    header = ["seed", "side", "base", *(f"step {every * (i + 1)}" for i in range(report["settings"]["points"]))]
    header += ["threshold", "wall s", "CPU s", "wall ratio", "CPU ratio"]
    rows = []
    for pair, row in zip(paired(report), report["summary"]["to_threshold"], strict=True):
        for run in pair:
            ours = run is pair[0]
            rows.append(
                [
                    str(run["seed"]), run["side"], f"{report['base'][str(run['seed'])]:.2f}",
                    *(f"{value:.2f}" for value in run["success"]), f"{row['threshold']:.2f}",
                    *(number(row[clock][run["side"]], ".1f") for clock in CLOCKS),
                    *("" if ours else number(row[clock]["ratio"], ".2f") for clock in CLOCKS),
                ]
            )  # fmt: skip
    return markdown(header, rows)


def speed_table(report: dict[str, Any]) -> str:
    found = report["summary"]
    rows = [
        [
            "wall clock" if clock == "wall" else "CPU time",
            *(f"{found['ms_per_step'][side][clock]:.0f}" for side in SIDES),
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            number(threshold_ratio(found, clock), ".2f"),
        ]
        for clock, ratio in found["step_ratio"].items()
    ]  # fmt: skip
    return markdown(["", "ours, ms/step", "TRL, ms/step", "TRL / ours, a step", "TRL / ours, to the threshold"], rows)


def phase_table(report: dict[str, Any]) -> str:
    phases = report["summary"]["phases"]
    rows = [
        [phase, *(f"{phases[side][phase][clock]:.1f}" for side in SIDES for clock in CLOCKS)]
        for phase in PHASES
        if any(phases[side][phase][clock] >= 0.05 for side in SIDES for clock in CLOCKS)
    ]
    rows.append(["sum", *(f"{sum(p[c] for p in phases[s].values()):.1f}" for s in SIDES for c in CLOCKS)])
    return markdown(["ms/step", "ours, wall", "ours, CPU", "TRL, wall", "TRL, CPU"], rows)
