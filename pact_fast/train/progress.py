"""Progress of a run for people: progress bars on a terminal, plain lines elsewhere. Printing never fails."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from pact_fast.streams import TolerantStream
from pact_fast.text import visible

LINE_SECONDS = 10.0  # without a terminal, shortest time between two lines of a phase


class Progress:
    """One bar for the run and one for the current phase. `quiet`: print nothing (ranks other than 0)."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=TolerantStream(sys.stderr), quiet=quiet)  # type: ignore[arg-type]
        self._live = self.console.is_terminal and not quiet
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"), console=self.console, transient=True,
        )  # fmt: skip
        self._run: Any = None

    def close(self) -> None:
        """Remove the bars and give the terminal its cursor back."""
        if self._live:
            self._bars.stop()
            self._live = False

    def note(self, text: str) -> None:
        """Print a line of plain text, control characters escaped."""
        self.console.print(visible(text), highlight=False, markup=False, soft_wrap=True)

    def print(self, renderable: RenderableType) -> None:
        """Print a table or another rich object."""
        self.console.print(renderable)

    def step(self, done: int, total: int, values: dict[str, Any]) -> None:
        """Report a finished training step, with a few of its metrics."""
        if self._live:
            if self._run is None:
                self._run = self._add("training", total)
            self._bars.update(self._run, completed=done, info=_brief(values))
        else:
            self.note(f"step {done}/{total}  {_brief(values)}")

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """A phase of `total` units of work; call the yielded function, with a remark, after each."""
        task = self._add(name, total)
        done, shown = 0, time.monotonic()

        def advance(info: str = "") -> None:
            nonlocal done, shown
            done += 1
            if task is not None:
                self._bars.update(task, completed=done, info=info)
            elif time.monotonic() - shown >= LINE_SECONDS or done == total:
                shown = time.monotonic()
                self.note(f"{name} {done}/{total}  {info}")

        yield advance
        if task is not None:
            self._bars.remove_task(task)

    @contextmanager
    def rollouts(self, total: int, name: str = "rollouts") -> Iterator[Callable[[], None]]:
        """Sampling of `total` rollouts; call the yielded function after each. Silent without a terminal."""
        task = self._add(f"  {name}", total)

        def advance() -> None:
            if task is not None:
                self._bars.advance(task)

        yield advance
        if task is not None:
            self._bars.remove_task(task)

    def _add(self, name: str, total: int) -> Any:
        """A new bar, None without a terminal. The display starts here, so that an early error leaves the cursor alone."""
        if not self._live:
            return None
        self._bars.start()
        return self._bars.add_task(name, total=total, info="")


def _brief(values: dict[str, Any]) -> str:
    parts = []
    for key, label, form in (
        ("success", "success", "{:.2f}"),
        ("reward/mean", "reward", "{:.2f}"),
        ("loss", "loss", "{:.4f}"),
        ("grad_norm", "grad", "{:.2f}"),
        ("time/rollout", "rollout", "{:.1f}s"),
        ("time/step", "step", "{:.1f}s"),
        ("tokens_per_second", "tok/s", "{:.0f}"),
    ):
        if key in values:
            parts.append(f"{label} {form.format(values[key])}")
    return "  ".join(parts)
