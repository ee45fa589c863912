"""Scores of an evaluation by category and group, as JSON and as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from pact_fast.evaluation.benchmark import Benchmark, CategoryGroup
from pact_fast.evaluation.results import Sample
from pact_fast.evaluation.statistics import estimate, pass_hat_k

Scores = dict[str, dict[str, float]]  # metric → {mean, low, high}
TaskValues = dict[str, dict[str, list[float]]]  # metric → category → one value per task


def summarise(kind: type[Benchmark], samples: Sequence[Sample], count: int) -> dict[str, Any]:
    """Scores of a finished evaluation.

    `pass@1` is the mean success of a task's samples, averaged over tasks; `pass^k` for 2 ≤ k ≤ count; then the means of
    the benchmark's metrics. Intervals: 95 %, by resampling tasks.

    Args:
        kind: The benchmark.
        samples: `count` samples of every task.
        count: Samples per task.

    Returns:
        {"categories": {name: row}, "groups": {name: row}}; a row holds "tasks", the scores, and (categories only) how
        often each stop reason occurred.
    """
    by_task: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        by_task.setdefault(sample.category, {}).setdefault(sample.task, []).append(sample)
    by_task = {name: by_task[name] for name in kind.categories if name in by_task}
    values = _task_values(kind, by_task, count)
    categories: dict[str, Any] = {}
    for name, tasks in by_task.items():
        stops = Counter(sample.stop_reason for taken in tasks.values() for sample in taken)
        categories[name] = {
            "tasks": len(tasks),
            **_scores(values, CategoryGroup(name, (name,))),
            "stop_reasons": dict(stops.most_common()),
        }
    groups = {
        group.name: {"tasks": sum(len(by_task[name]) for name in group.categories), **_scores(values, group)}
        for group in kind.groups
        if all(name in by_task for name in group.categories)
    }
    return {"categories": categories, "groups": groups}


def summary_table(kind: type[Benchmark], summary: Mapping[str, Any], title: str) -> Table:
    """One row per category and group: tasks, then each score in percent with its interval."""
    rows = [*summary["categories"].items(), *summary["groups"].items()]
    metrics = (
        [name for name, value in rows[0][1].items() if isinstance(value, dict) and "mean" in value] if rows else []
    )
    table = Table(title=title, caption="percent [95 % bootstrap interval over tasks]")
    table.add_column("category")
    table.add_column("tasks", justify="right")
    for name in metrics:
        table.add_column(kind.metrics.get(name, name), justify="right")
    for index, (name, row) in enumerate(rows):
        if index == len(summary["categories"]):
            table.add_section()
        table.add_row(name, str(row["tasks"]), *(_percent(row.get(metric)) for metric in metrics))
    return table


def _task_values(kind: type[Benchmark], by_task: Mapping[str, Mapping[str, list[Sample]]], count: int) -> TaskValues:
    values: TaskValues = {}
    for category, tasks in by_task.items():
        for taken in tasks.values():
            solved = sum(sample.success >= 1 for sample in taken)
            own = {"pass@1": float(np.mean([sample.success for sample in taken]))}
            own |= {f"pass^{k}": pass_hat_k(solved, len(taken), k) for k in range(2, count + 1)}
            for metric in kind.metrics:
                given = [sample.rewards.get(metric, 0.0) for sample in taken]
                own[metric] = float(np.mean(given))
            for metric, value in own.items():
                values.setdefault(metric, {}).setdefault(category, []).append(value)
    return values


def _scores(values: TaskValues, group: CategoryGroup) -> Scores:
    return {
        metric: estimate({name: columns[name] for name in group.categories}, group.by).to_json()
        for metric, columns in values.items()
    }


def _percent(score: Mapping[str, float] | None) -> str:
    if score is None:
        return "–"
    mean, low, high = (100 * score[name] for name in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"
