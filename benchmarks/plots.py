"""The plots of the README, drawn from committed results: nothing is measured here.

    pip install -e '.[bench]' && python -m benchmarks.plots

docs/images/quickstart.svg    success on held-out tasks before and after the quickstart, three seeds
docs/images/update-step.svg   time and memory of one update, with and without shared prefixes
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
QUICKSTART = "quickstart-2026-11-28.json"
UPDATE = "update-step-cpu-bf16-2026-11-28.json"
BEFORE, AFTER = "#9aa5b1", "#2463a8"
VARIANTS = {  # of the update benchmark: label
    "alone": "padded batches of 8, all logits",
    "kept": "padded batches of 8, supervised logits",
    "alone-1": "one sequence at a time, all logits",
    "kept-1": "one sequence at a time, supervised logits",
    "flat-pact": "prompt shared, our loss",
    "tree": "pact_fast: tree, our loss",
}


def quickstart(plt: Any) -> Any:
    """Base and trained success with 95 % intervals."""
    runs = json.loads((RESULTS / QUICKSTART).read_text("utf-8"))["runs"]
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True)
    for axis, title, base, trained in zip(
        axes, ("sampled, temperature 1", "greedy"), ("base_success", "base_greedy"), ("success", "greedy"), strict=True
    ):
        for place, run in enumerate(runs):
            for key, colour, label in ((base, BEFORE, "base"), (trained, AFTER, "after 70 steps")):
                rate = run[key]
                error = [[max(rate["mean"] - rate["low"], 0.0)], [max(rate["high"] - rate["mean"], 0.0)]]
                axis.errorbar(
                    place,
                    rate["mean"],
                    yerr=error,
                    fmt="o",
                    color=colour,
                    capsize=4,
                    label=label if not place else None,
                )
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(runs)), [f"seed {run['seed']}" for run in runs])
        axis.set_xlim(-0.5, len(runs) - 0.5)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylim(0, 1.03)
    axes[0].set_ylabel("success, 250 held-out tasks")
    axes[1].legend(loc="center right", fontsize=9, frameon=False)
    return figure


def update_step(plt: Any) -> Any:
    """Seconds and peak memory of one optimizer step by variant."""
    rows = {row["variant"]: row for row in json.loads((RESULTS / UPDATE).read_text("utf-8"))["cases"][0]["rows"]}
    names = [name for name in VARIANTS if rows.get(name, {}).get("status") == "ok"][::-1]
    colours = [AFTER if name == "tree" else BEFORE for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 2.6), sharey=True)
    for axis, title, values in (
        (axes[0], "seconds", [rows[name]["seconds"] for name in names]),
        (axes[1], "peak memory, GiB", [rows[name]["peak_bytes"] / 2**30 for name in names]),
    ):
        bars = axis.barh([VARIANTS[name] for name in names], values, color=colours)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axis.set_xlim(0, 1.15 * max(values))
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", labelsize=9)
    return figure


def main() -> None:
    """Draw both; files are the same from run to run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pact_fast"
    import matplotlib.pyplot as plt

    IMAGES.mkdir(exist_ok=True)
    for name, draw in (("quickstart", quickstart), ("update-step", update_step)):
        figure = draw(plt)
        figure.savefig(IMAGES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        print(IMAGES / f"{name}.svg")


if __name__ == "__main__":
    main()
