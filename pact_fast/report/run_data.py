"""Reading a run directory that may be incomplete: the run may still be going, or was killed in the middle of a line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pact_fast.components import Component
from pact_fast.errors import PactError

Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """A token sequence as columns, all of length n; None where a number does not apply.

    `weights` are the policy-loss weights of a rollout, or the SFT weights of an expert trace; `sampled` marks the
    tokens that the policy generated (of an expert trace: the supervised ones).
    """

    text: list[str]
    components: list[int]
    sampled: list[bool]
    turns: list[int]
    logprobs: list[float | None]
    advantages: list[float | None]
    weights: list[float | None]

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Rollout:
    """One line of rollouts/step_N.jsonl (training) or rollouts/eval_N.jsonl."""

    step: int
    kind: str  # train | eval
    task_id: str
    route: str | None  # trace | prompt | blend
    stop_reason: str
    reward: float | None
    reward_parts: dict[str, float]
    turn_rewards: list[float | None]
    success: float | None
    question: str
    prompt: str
    response: Tokens
    expert: Tokens | None

    @classmethod
    def from_record(cls, record: Record) -> Rollout:
        """From a decoded line. A missing or misshapen field becomes empty, a short column is padded with None."""
        parts, turn_rewards = record.get("reward_parts"), record.get("turn_rewards")
        expert = record.get("expert")
        response = _tokens(record)
        return cls(
            step=int(number(record.get("step")) or 0),
            kind=_text(record.get("kind")),
            task_id=_text(record.get("task_id")),
            route=_text(record.get("route")) or None,
            stop_reason=_text(record.get("stop_reason")),
            reward=number(record.get("reward")),
            reward_parts=_finite(parts) if isinstance(parts, dict) else {},
            turn_rewards=[number(r) for r in turn_rewards] if isinstance(turn_rewards, list) else [],
            success=number(record.get("success")),
            question=_text(record.get("question")),
            prompt=_text(record.get("prompt")),
            response=response,
            expert=_expert_tokens(expert) if isinstance(expert, dict) else None,
        )


@dataclass
class Run:
    """What a run directory holds so far.

    `metrics` has one flat record a step, sorted by step, finite numbers only. `rollouts` is a sample of the
    `rollouts_written`, newest step first. `problems` are sentences for the reader of the report.
    """

    name: str
    config: str = ""
    summary: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    rollouts_written: int = 0
    problems: list[str] = field(default_factory=list)


def read_run(run_dir: Path, *, rollouts: int, step: int | None = None) -> Run:
    """Read a run with at most `rollouts` rollouts, spread over the steps, or all from `step`.

    Raises PactError if there is no such directory, or no rollouts of `step`.
    """
    if not run_dir.is_dir():
        raise PactError(f"no run directory at '{run_dir}'; give the output_dir of a run, for example runs/quickstart")
    run = Run(run_dir.resolve().name, config=_read_text(run_dir / "config.yaml"))
    run.summary = _read_object(run_dir / "summary.json")
    _read_metrics(run_dir / "metrics.jsonl", run)
    _read_rollouts(run_dir / "rollouts", run, rollouts, step)
    return run


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spaced; the first and the last are among them when count ≥ 2."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[len(items) - count :])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:  # JSON integers have no limit
        return None
    return result if math.isfinite(result) else None


def _read_metrics(path: Path, run: Run) -> None:
    """A resumed run writes some steps twice: the later record counts."""
    by_step: dict[int, Record] = {}
    not_finite: dict[str, int] = {}
    lines, torn = _read_lines(path)
    for record in lines:
        step = number(record.get("step"))
        if step is None:
            continue
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                not_finite.setdefault(key, int(step))
        by_step.setdefault(int(step), {}).update(_finite(record))
    run.metrics = [by_step[step] | {"step": step} for step in sorted(by_step)]
    run.problems += [f"{key} was not a finite number at step {step}." for key, step in not_finite.items()]
    if torn:
        run.problems.append(f"metrics.jsonl: {torn} torn {'line' if torn == 1 else 'lines'} skipped.")


def _read_rollouts(folder: Path, run: Run, limit: int, step: int | None) -> None:
    places = _places(folder)
    if step is not None:
        if step not in places:
            raise PactError(
                f"'{folder}' holds no rollouts of step {step}; trainer.save_rollouts says how many are written"
            )
        places = {step: places[step]}
    run.rollouts_written = sum(map(len, places.values()))
    # Few rollouts from many steps show progress; fewer than four of a step show too little of it.
    per_step = max(4, limit // max(len(places), 1))
    torn = 0
    for chosen in reversed(spread(list(places.values()), max(limit // per_step, 1))):
        lines: dict[Path, set[int]] = {}
        for file, index in spread(chosen, min(per_step, limit)):
            lines.setdefault(file, set()).add(index)
        for file, wanted in lines.items():
            records, skipped = _read_lines(file, wanted)
            run.rollouts += map(Rollout.from_record, records)
            torn += skipped
    if torn:
        run.problems.append(f"rollouts: {torn} torn {'line' if torn == 1 else 'lines'} skipped.")


def _places(folder: Path) -> dict[int, list[tuple[Path, int]]]:
    """Step → where its rollouts are, as (file, line index); in the order of the steps, training before evaluation."""
    places: dict[int, list[tuple[Path, int]]] = {}
    files = {
        file: re.fullmatch(r"(step|eval)_(\d+)", file.stem) for file in sorted(folder.glob("*.jsonl"), reverse=True)
    }
    for file, match in files.items():
        if match:
            with file.open("rb") as lines:
                places.setdefault(int(match[2]), []).extend((file, index) for index, _ in enumerate(lines))
    return {step: places[step] for step in sorted(places) if places[step]}


def _read_lines(path: Path, wanted: set[int] | None = None) -> tuple[list[Record], int]:
    """The objects on the `wanted` (0-based) lines, all by default, and the number of lines that hold none."""
    if not path.is_file():
        return [], 0
    records, torn = [], 0
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if wanted is not None and index not in wanted:
                continue
            record = _decode(line.decode("utf-8", errors="replace"))
            if record is None:
                torn += 1
            else:
                records.append(record)
    return records, torn


def _read_object(path: Path) -> Record:
    return _decode(_read_text(path)) or {}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _decode(text: str) -> Record | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _tokens(record: Record) -> Tokens:
    text = record.get("tokens")
    text = [_text(token) for token in text] if isinstance(text, list) else []
    n = len(text)
    return Tokens(
        text=text,
        components=_components(record.get("components"), n),
        sampled=[bool(flag) for flag in _column(record.get("sampled"), n)],
        turns=[int(turn or 0) for turn in _column(record.get("turn_ids"), n)],
        logprobs=_column(record.get("logprobs"), n),
        advantages=_column(record.get("advantages"), n),
        weights=_column(record.get("weights"), n),
    )


def _expert_tokens(record: Record) -> Tokens:
    tokens = _tokens(record)
    tokens.sampled[:] = [bool(weight) for weight in tokens.weights]
    return tokens


def _components(values: Any, n: int) -> list[int]:
    known = {int(component) for component in Component}
    return [int(v) if v in known else int(Component.TEMPLATE) for v in _column(values, n)]


def _column(values: Any, n: int) -> list[float | None]:
    """Finite numbers or None, exactly n of them. Booleans count as 0 and 1."""
    values = values if isinstance(values, list) else []
    numbers = [number(int(value) if isinstance(value, bool) else value) for value in values[:n]]
    return numbers + [None] * (n - len(numbers))


def _finite(record: Record) -> dict[str, float]:
    numbers = {str(key): number(value) for key, value in record.items()}
    return {key: value for key, value in numbers.items() if value is not None}


def _text(value: Any) -> str:
    return "" if value is None else str(value)
