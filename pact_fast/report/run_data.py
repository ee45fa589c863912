"""Reads a run directory that may be incomplete: the run may be in progress, or was killed in the middle of a line."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pact_fast.components import Component
from pact_fast.errors import PactError
from pact_fast.report.rollout_files import count_rollouts, read_index, read_lines, rollout_files

Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class TokenColumns:
    """A token sequence as columns of length n; None where a value does not apply.

    text        decoded tokens
    components  see Component
    sampled     tokens that the policy generated; in an expert trace, the supervised ones
    turns       index of the assistant turn
    logprobs    log-probs of the sampler
    advantages  token advantages
    weights     policy-loss weights of a rollout, or SFT weights of an expert trace
    branches    number of the branch that each token belongs to, from 0; empty: there is one alone
    """

    text: list[str]
    components: list[int]
    sampled: list[bool]
    turns: list[int]
    logprobs: list[float | None]
    advantages: list[float | None]
    weights: list[float | None]
    branches: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Rollout:
    """One line of a file in rollouts/ (`rollout_files`); fields as `train.records` writes them."""

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
    response: TokenColumns
    expert: TokenColumns | None

    @classmethod
    def from_record(cls, record: Record) -> Rollout:
        """From a decoded line. A missing or malformed field becomes empty, a short column is padded with None."""
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
    """Content of a run directory.

    name              name of the directory
    config            text of config.yaml
    summary           content of summary.json
    metrics           one flat record per step, sorted by step; finite values only
    rollouts          a sample of the rollouts on disk, newest step first
    rollouts_written  number of rollouts on disk
    problems          sentences for the reader of the report
    """

    name: str
    config: str = ""
    summary: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    rollouts_written: int = 0
    problems: list[str] = field(default_factory=list)


def read_run(run_dir: Path, *, rollouts: int, step: int | None = None) -> Run:
    """Read a run.

    Args:
        run_dir: The run directory.
        rollouts: Most rollouts to read, sampled evenly over the steps.
        step: Read rollouts of this step only.

    Raises:
        PactError: There is no such directory, or there are no rollouts of `step`.
    """
    if not run_dir.is_dir():
        raise PactError(f"no run directory at '{run_dir}'; give the output_dir of a run, for example runs/quickstart")
    run = Run(run_dir.resolve().name, config=_read_text(run_dir / "config.yaml"))
    run.summary = _read_object(run_dir / "summary.json")
    _read_metrics(run_dir / "metrics.jsonl", run)
    _read_rollouts(run_dir / "rollouts", run, rollouts, step)
    return run


def sample_evenly(items: Sequence[T], count: int) -> list[T]:
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
    """Read metrics.jsonl. Of several records of a step (a resumed run), later values replace earlier ones."""
    by_step: dict[int, Record] = {}
    not_finite: dict[str, int] = {}
    lines, truncated = _read_lines(path)
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
    if truncated:
        run.problems.append(f"metrics.jsonl: {_lines(truncated)} skipped.")


def _read_rollouts(folder: Path, run: Run, limit: int, step: int | None) -> None:
    places = _places(folder, step)
    if step is not None and not places:
        raise PactError(
            f"'{folder}' holds no rollouts of step {step}; trainer.save_rollouts says how many are written, and "
            "trainer.keep_rollouts how long"
        )
    run.rollouts_written = sum(map(len, places.values()))
    # at least four rollouts per step, from as many steps as the limit allows
    per_step = max(4, limit // max(len(places), 1))
    truncated = 0
    for chosen in reversed(sample_evenly(list(places.values()), max(limit // per_step, 1))):
        lines: dict[Path, set[int]] = {}
        for file, index in sample_evenly(chosen, min(per_step, limit)):
            lines.setdefault(file, set()).add(index)
        for file, wanted in lines.items():
            records, skipped = _read_lines(file, wanted)
            run.rollouts += map(Rollout.from_record, records)
            truncated += skipped
    if truncated:
        run.problems.append(f"rollouts: {_lines(truncated)} skipped.")


def _lines(count: int) -> str:
    return f"{count} truncated {'line' if count == 1 else 'lines'}"


def _places(folder: Path, step: int | None) -> dict[int, list[tuple[Path, int]]]:
    """Step → (file, line index) of its rollouts; steps in order, training before evaluation. `step`: of this one only."""
    places: dict[int, list[tuple[Path, int]]] = {}
    index = read_index(folder)
    for number, file in rollout_files(folder, ("step", "eval"), step):
        count = count_rollouts(file, index)
        if count:
            places.setdefault(number, []).extend((file, line) for line in range(count))
    return places


def _read_lines(path: Path, wanted: set[int] | None = None) -> tuple[list[Record], int]:
    """JSON objects on the `wanted` (0-based) lines, default: all, and the number of lines that are not JSON objects."""
    if not path.is_file():
        return [], 0
    records, truncated = [], 0
    for index, line in enumerate(read_lines(path)):
        if wanted is not None and index not in wanted:
            continue
        record = _decode(line.decode("utf-8", errors="replace"))
        if record is None:
            truncated += 1
        else:
            records.append(record)
    return records, truncated


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


def _tokens(record: Record) -> TokenColumns:
    text = record.get("tokens")
    text = [_text(token) for token in text] if isinstance(text, list) else []
    n = len(text)
    return TokenColumns(
        text=text,
        components=_components(record.get("components"), n),
        sampled=[bool(flag) for flag in _column(record.get("sampled"), n)],
        turns=[int(turn or 0) for turn in _column(record.get("turn_ids"), n)],
        logprobs=_column(record.get("logprobs"), n),
        advantages=_column(record.get("advantages"), n),
        weights=_column(record.get("weights"), n),
        branches=_branches(record.get("branches"), n),
    )


def _expert_tokens(record: Record) -> TokenColumns:
    tokens = _tokens(record)
    tokens.sampled[:] = [bool(weight) for weight in tokens.weights]
    return tokens


def _branches(values: Any, n: int) -> list[int]:
    """The branch of each of n tokens, from records of (start, …); empty if there is none, or a start is no number."""
    rows = [one for one in values if isinstance(one, list) and one] if isinstance(values, list) else []
    starts = sorted(start for start in (number(one[0]) for one in rows) if start is not None)
    return [bisect.bisect_right(starts, index) for index in range(n)] if starts else []


def _components(values: Any, n: int) -> list[int]:
    known = {int(component) for component in Component}
    return [int(v) if v in known else int(Component.TEMPLATE) for v in _column(values, n)]


def _column(values: Any, n: int) -> list[float | None]:
    """Exactly n finite numbers or None. Booleans count as 0 and 1."""
    values = values if isinstance(values, list) else []
    numbers = [number(int(value) if isinstance(value, bool) else value) for value in values[:n]]
    return numbers + [None] * (n - len(numbers))


def _finite(record: Record) -> dict[str, float]:
    numbers = {str(key): number(value) for key, value in record.items()}
    return {key: value for key, value in numbers.items() if value is not None}


def _text(value: Any) -> str:
    return "" if value is None else str(value)
