"""Rollouts and results in the terminal.

All text from a run is untrusted: it is never parsed as rich markup, and control characters are escaped. A record is a
line of rollouts/step_N.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pact_fast.components import Component
from pact_fast.report.before_after import Rate, comparisons, percent, points
from pact_fast.report.run_data import Record, Rollout, TokenColumns
from pact_fast.text import visible

STYLES = {
    Component.TEMPLATE: "dim",
    Component.REASONING: "cyan",
    Component.TOOL_CALL: "yellow underline",
    Component.ANSWER: "bold green",
    Component.OBSERVATION: "italic magenta",
    Component.USER: "blue",
}


def rollout_table(records: Sequence[Record], limit: int = 4, width: int = 400) -> Table:
    """The first `limit` rollouts, one per row: question, completion (coloured, cut to `width` characters), rewards."""
    table = Table(show_lines=True, expand=True)
    table.add_column("question", ratio=2)
    table.add_column(_legend(), ratio=5)
    table.add_column("reward", no_wrap=True)
    for rollout in map(Rollout.from_record, records[:limit]):
        completion = _coloured(rollout.response)
        if len(completion) > width:
            completion.truncate(width - 1)
            completion.append("…")
        table.add_row(Text(visible(rollout.question)), completion, _rewards(rollout))
    return table


def print_rollout(record: Record, console: Console | None = None) -> None:
    """Print a whole rollout, coloured by component, and its expert trace."""
    console = console or Console()
    rollout = Rollout.from_record(record)
    title = Text(" · ".join(_heading(rollout)))
    parts: list[Any] = [Text(visible(rollout.question), style="bold"), Text(), _coloured(rollout.response)]
    if rollout.expert:
        parts += [Text("\nexpert trace", style="bold"), Text(), _coloured(rollout.expert)]
    console.print(Panel(Group(*parts), title=title, subtitle=_legend()))
    console.print(_rewards(rollout))


def summary_table(summary: Record) -> Table:
    """Success before and after training with 95 % intervals. `summary`: content of summary.json."""
    table = Table()
    table.add_column("success")
    for name in ("base", "trained", "change, points"):
        table.add_column(name, justify="right")
    for row in comparisons(summary):
        change = row.change
        table.add_row(
            Text(row.label).append(f"\n{row.conditions}" if row.conditions else "", style="dim"),
            _rate(row.base, percent),
            _rate(row.trained, percent),
            _rate(change, points, {1: "green", 0: "", -1: "red"}[row.sign]),
        )
    return table


def _coloured(tokens: TokenColumns) -> Text:
    text = Text()
    for token, component in zip(tokens.text, tokens.components, strict=True):
        text.append(visible(token), style=STYLES[Component(component)])
    return text


def _legend() -> Text:
    text = Text()
    for component, style in STYLES.items():
        text.append(component.name.lower().replace("_", " "), style=style).append(" ")
    text.rstrip()
    return text


def _heading(rollout: Rollout) -> list[str]:
    parts = [f"step {rollout.step}", rollout.kind, rollout.task_id, rollout.route and f"route {rollout.route}"]
    return [visible(part) for part in parts if part]


def _rewards(rollout: Rollout) -> Text:
    total = "–" if rollout.reward is None else f"{rollout.reward:.3g}"
    text = Text(f"total {total}\n", style="bold")
    for name, value in rollout.reward_parts.items():
        text.append(f"{visible(name)} {value:.3g}\n", style="none")
    text.append(visible(rollout.stop_reason), style="dim")
    if rollout.response.branches:
        text.append(f"\n{max(rollout.response.branches) + 1} branches", style="dim")
    return text


def _rate(rate: Rate | None, form: Callable[[float], str], style: str = "") -> Text:
    if rate is None:
        return Text("–", style="dim")
    ends = rate.interval(form)
    return Text(form(rate.mean), style=style).append(f"\n{ends}" if ends else "", style="dim")
