"""Tables and plots of the learning study, from its committed results: nothing is measured here.

python -m benchmarks.learning_report                            docs/results.md and docs/images/learning-*.png
python -m benchmarks.learning_report results.json --print       the tables of other results, on the terminal

In docs/results.md, what stands between <!-- table NAME --> and <!-- end --> is replaced; the rest is written by hand.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import make_parser, markdown, new_report, write_report
from benchmarks.learning_methods import ALL, METHODS
from benchmarks.learning_regimes import REGIMES
from benchmarks.learning_stats import Interval, Paired
from benchmarks.learning_tuning import best_rate, tried_rates

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "learning-cpu-2026-12-01.json"
PAGE, IMAGES = ROOT / "docs" / "results.md", ROOT / "docs" / "images"
COLOURS = ("#2463a8", "#c8553d", "#2a9d6f", "#b58900", "#7a4fa3", "#555f6b", "#d1719c", "#3aa6b9", "#8c6d46", "#1b1b1b")
OURS, BASE = "pact", "base"
KINDS = ("sampled", "greedy")
RELIANCE = "trace_logprob_diff"  # of a record: the metric trace/logprob_diff, step by step


@dataclass(frozen=True)
class Study:
    """The records of a study.

    A study that went on with more learning rates may hold test runs of a rate that was the best one before: only those
    of the best rate count.

    runs    of test runs and of base models, by regime and method
    tuning  of the runs that chose learning rates, on validation tasks
    """

    runs: dict[tuple[str, str], list[dict[str, Any]]]
    tuning: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Study:
        """The study of a result file of `benchmarks.learning`."""
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        records = json.loads(path.read_text("utf-8"))["runs"]
        for record in records:
            key = record["regime"], record["method"]
            best = best_rate(records, *key, tried_rates(records, *key))
            if record["part"] == "test" and best in (record["learning_rate"], None):
                runs.setdefault(key, []).append(record)
        return cls(runs, [record for record in records if record["part"] == "validation"])

    @property
    def regimes(self) -> list[str]:
        """Regimes with results, in the order of REGIMES."""
        return [name for name in REGIMES if any(regime == name for regime, _ in self.runs)]

    def methods(self, regime: str) -> list[str]:
        """Methods with results in a regime, in the order of the table of methods; without the base model."""
        return [name for name in ALL if (regime, name) in self.runs]

    def by_seed(self, regime: str, method: str, key: str) -> dict[int, float]:
        """A value at the end of training, by seed."""
        return {record["seed"]: record["curve"][-1][key] for record in self.runs.get((regime, method), [])}

    def final(self, regime: str, method: str, key: str) -> Interval:
        """Mean over seeds and interval of a value at the end of training."""
        return Interval.of(list(self.by_seed(regime, method, key).values()))


def regime_table(study: Study, regime: str) -> str:
    """One row for each method: success with intervals, the paired differences from PACT with p-values, and costs."""
    header = [
        "method",
        "seeds",
        "learning rate",
        "sampled",
        "greedy",
        "PACT − method, sampled",
        "PACT − method, greedy",
    ]
    names = [name for name in (BASE, *study.methods(regime)) if (regime, name) in study.runs]
    return markdown([*header, "tokens sampled", "CPU s"], [_row(study, regime, name) for name in names])


def _row(study: Study, regime: str, method: str) -> list[str]:
    records = study.runs[regime, method]
    success = [study.final(regime, method, kind).text() for kind in KINDS]
    against = [_difference(study, regime, method, kind) for kind in KINDS]
    if method == BASE:
        return ["base model", str(len(records)), "", *success, *against, "", ""]
    tokens, cpu = (study.final(regime, method, key).mean for key in ("tokens", "cpu_seconds"))
    rate = f"{records[0]['learning_rate']:g}"
    return [f"`{method}`", str(len(records)), rate, *success, *against, f"{tokens:,.0f}", f"{cpu:.1f}"]


def _difference(study: Study, regime: str, method: str, kind: str) -> str:
    """`+0.10 [+0.01, +0.18], p 0.032`; empty for PACT itself."""
    paired = Paired.of(study.by_seed(regime, OURS, kind), study.by_seed(regime, method, kind))
    if method == OURS or not paired.difference.n:
        return ""
    return paired.difference.text(sign=True) + _p_value(paired.p)


def _p_value(p: float) -> str:
    if math.isnan(p):
        return ""
    return ", p < 0.001" if p < 0.001 else f", p {p:.3f}"


def rank_table(study: Study) -> str:
    """PACT's rank by mean sampled success in every regime, and the best method; without ablations."""
    rows = []
    for regime in study.regimes:
        others = [name for name in study.methods(regime) if name in METHODS and name != OURS]
        means = {name: study.final(regime, name, "sampled").mean for name in others}
        if (regime, OURS) not in study.runs or not means:
            continue
        ours = study.final(regime, OURS, "sampled")
        best = max(means, key=lambda name: means[name])
        paired = Paired.of(study.by_seed(regime, OURS, "sampled"), study.by_seed(regime, best, "sampled"))
        rank = 1 + sum(mean > ours.mean for mean in means.values())
        cells = [f"`{regime}`", REGIMES[regime].about, f"{rank} of {len(means) + 1}", ours.text(), f"`{best}`"]
        rows.append([*cells, study.final(regime, best, "sampled").text(), paired.difference.text(sign=True)])
    header = ["regime", "", "PACT's rank", "PACT, sampled", "best other", "its success", "PACT − best other"]
    return markdown(header, rows)


def reliance_table(study: Study) -> str:
    """Success of the base model without and with the trace in its prompt; and the log-probs of PACT's rollouts with the trace
    less those without, in nats per token, in the first and the last step.
    """
    rows = []
    for regime in study.regimes:
        bases, ours = (study.runs.get((regime, name), []) for name in (BASE, OURS))
        if (
            not ours
            or any("with_trace" not in record for record in bases)
            or any(RELIANCE not in record for record in ours)
        ):
            continue
        with_trace = Interval.of([record["with_trace"]["sampled"] for record in bases])
        ends = [Interval.of([record[RELIANCE][step] for record in ours]).text(sign=True) for step in (0, -1)]
        rows.append([f"`{regime}`", study.final(regime, BASE, "sampled").text(), with_trace.text(), *ends])
    header = ["regime", "base model, sampled", "with the trace in its prompt", "log-probs, first step", "last step"]
    return markdown(header, rows)


def tables(study: Study) -> dict[str, str]:
    """All tables by name."""
    summaries = {"ranks": rank_table(study), "reliance": reliance_table(study)}
    return summaries | {regime: regime_table(study, regime) for regime in study.regimes}


def fill(page: str, new: dict[str, str]) -> str:
    """The page with the tables between its markers replaced. KeyError: it names a table that there is not."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{new[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", replaced, page, flags=re.DOTALL)


def draw(study: Study, plt: Any, cost: str, label: str) -> Any:
    """Success on held-out tasks against a cost of training: a column for each regime, sampled above greedy.

    Args:
        study: What is drawn.
        plt: The module matplotlib.pyplot.
        cost: Key of an entry of "curve": step, tokens, cpu_seconds or wall_seconds.
        label: Of the horizontal axis.

    Returns:
        The figure.
    """
    regimes = study.regimes
    size = (1.5 + 2.8 * len(regimes), 4.6)
    figure, axes = plt.subplots(2, len(regimes), figsize=size, sharex="col", sharey=True, squeeze=False)
    for column, regime in enumerate(regimes):
        for row, kind in enumerate(KINDS):
            _panel(axes[row][column], study, regime, kind, cost)
            axes[row][0].set_ylabel(f"success, {kind}")
        axes[0][column].set_title(regime, fontsize=10)
        axes[1][column].set_xlabel(label, fontsize=9)
    axes[0][0].set_ylim(-0.02, 1.02)
    drawn = [axis.get_legend_handles_labels() for axis in axes.flat]
    handles = {name: handle for pair in drawn for handle, name in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    figure.tight_layout()
    return figure


def _panel(axis: Any, study: Study, regime: str, kind: str, cost: str) -> None:
    """Curves of all methods, from the base model on; bars are 95 % intervals."""
    colours = dict(zip(_all_methods(study), COLOURS, strict=False))
    start = study.final(regime, BASE, kind).mean
    for method in filter(colours.get, study.methods(regime)):
        points = _curve(study.runs[regime, method], cost, kind)
        x, y = [0.0, *(p[0] for p in points)], [start, *(p[1].mean for p in points)]
        half = [0.0, *(p[1].high - p[1].mean if p[1].n > 1 else 0.0 for p in points)]
        width = 2 if method == OURS else 1.2
        axis.errorbar(x, y, yerr=half, color=colours[method], label=method, capsize=2, linewidth=width)
    axis.grid(alpha=0.3)


def _all_methods(study: Study) -> list[str]:
    """PACT first; without ablations."""
    return [OURS, *(name for name in METHODS if name != OURS and any(name == method for _, method in study.runs))]


def _curve(records: Iterable[dict[str, Any]], cost: str, kind: str) -> list[tuple[float, Interval]]:
    """(mean cost, success) at every evaluated step."""
    points: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        for point in record["curve"]:
            points.setdefault(point["step"], []).append(point)
    return [
        (sum(p[cost] for p in group) / len(group), Interval.of([p[kind] for p in group]))
        for _, group in sorted(points.items())
    ]


PLOTS = {"steps": ("step", "optimizer steps"), "cpu": ("cpu_seconds", "CPU seconds of training")}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "learning_report")
    default = ROOT / "benchmarks" / "results" / RESULTS
    parser.add_argument("results", type=Path, nargs="?", default=default, help=f"(default: {RESULTS})")
    parser.add_argument("--print", action="store_true", help="print the tables; write neither page nor plots")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    study = Study.read(args.results)
    made = tables(study)
    write_report(new_report("learning_report", args, tables=made), args.out)
    if args.print:
        print("\n\n".join(f"{name}\n{table}" for name, table in made.items()))
        return 0
    PAGE.write_text(fill(PAGE.read_text("utf-8"), made), "utf-8")
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    for name, (cost, label) in PLOTS.items():
        figure = draw(study, plt, cost, label)
        path = IMAGES / f"learning-{name}.png"
        figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
