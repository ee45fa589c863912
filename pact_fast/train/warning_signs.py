"""Signs that a run degenerates: groups without signal, collapsed entropy, unsure control tokens, reliance on the trace.

They are functions of the metrics of this step and of earlier ones, so a resumed run, which reads those back, has the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

BASELINE_STEPS = 3  # steps whose mean a run is compared with
RECENT_STEPS = 5  # steps over which the present is averaged
Metrics = Mapping[str, float | None]


class Sign(NamedTuple):
    """One sign: whether it shows, from the mean values of the first and of the last steps, and what it means.

    keys   metrics that it needs; a sign that lacks one does not show
    shows  (first, last), each by key
    text   for the console; may use {first} and {last}, the values of the first key
    """

    keys: tuple[str, ...]
    shows: Callable[[dict[str, float], dict[str, float]], bool]
    text: str


def _no_signal(first: dict[str, float], last: dict[str, float]) -> bool:
    return last["reward/zero_advantage_groups"] >= 0.9


def _collapsed(first: dict[str, float], last: dict[str, float]) -> bool:
    """Entropy may fall while success rises; that is learning."""
    return last["prompt/entropy"] < 0.1 * first["prompt/entropy"] and last["success"] <= first["success"] + 0.05


def _unsure(first: dict[str, float], last: dict[str, float]) -> bool:
    return last["control_token_prob"] < 0.5 * first["control_token_prob"]


def _reliant(first: dict[str, float], last: dict[str, float]) -> bool:
    now, before = abs(last["trace/logprob_diff"]), abs(first["trace/logprob_diff"])
    return now > 1.0 and now > 3.0 * before


SIGNS = {
    "no_signal": Sign(
        ("reward/zero_advantage_groups",),
        _no_signal,
        f"in the last {RECENT_STEPS} steps, {{last:.0%}} of the groups had no advantage: all rollouts of a prompt earn the "
        "same; choose easier or harder tasks, more rollouts per prompt, or algorithm.filter_groups",
    ),
    "entropy": Sign(
        ("prompt/entropy", "success"),
        _collapsed,
        "entropy fell from {first:.3f} to {last:.3f} and success did not rise: the policy repeats itself; lower "
        "trainer.learning_rate, or set algorithm.entropy_coef",
    ),
    "control_tokens": Sign(
        ("control_token_prob",),
        _unsure,
        "the probability of sampled control tokens fell from {first:.2f} to {last:.2f}: the policy forgets how turns and "
        "calls are written; lower trainer.learning_rate",
    ),
    "trace_reliance": Sign(
        ("trace/logprob_diff",),
        _reliant,
        "log-probs of rollouts with and without the trace differ by {last:+.2f} nats a token, at first by {first:+.2f}: what "
        "is learned given the trace may not hold without it; raise algorithm.anchor.q",
    ),
}


class WarningSigns:
    """Follows the metrics of a run, step by step."""

    def __init__(self) -> None:
        self._history: dict[str, list[float]] = {key: [] for sign in SIGNS.values() for key in sign.keys}
        self._told: set[str] = set()

    @classmethod
    def resumed(cls, path: Path) -> WarningSigns:
        """After the steps of metrics.jsonl, whose warnings are not told again."""
        signs = cls()
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                record = json.loads(line)
                if "time/step" in record:  # not an evaluation
                    signs.see(record)
        return signs

    def see(self, metrics: Metrics) -> tuple[dict[str, float], list[str]]:
        """The metrics `warnings/…` of a step (1: the sign shows), and texts of signs that show for the first time."""
        for key, values in self._history.items():
            value = metrics.get(key)
            if value is not None and math.isfinite(value):  # metrics.jsonl has null for non-finite values
                values.append(value)
        found, texts = {}, []
        for name, sign in SIGNS.items():
            if min(len(self._history[key]) for key in sign.keys) < BASELINE_STEPS + RECENT_STEPS:
                continue
            first = {key: _mean(self._history[key][:BASELINE_STEPS]) for key in sign.keys}
            last = {key: _mean(self._history[key][-RECENT_STEPS:]) for key in sign.keys}
            found[f"warnings/{name}"] = float(sign.shows(first, last))
            if found[f"warnings/{name}"] and name not in self._told:
                self._told.add(name)
                texts.append("warning: " + sign.text.format(first=first[sign.keys[0]], last=last[sign.keys[0]]))
        return found, texts


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
