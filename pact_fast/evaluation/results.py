"""Finished samples of an evaluation on disk: an interrupted evaluation continues where it stopped.

OUT/settings.json              settings of all samples
OUT/results.jsonl              one line per finished sample, see `Sample`
OUT/rollouts/eval_N.jsonl      the failures, FAILURES_PER_PAGE per file, for `pact-fast view OUT --step N`
OUT/summary.json               scores by category
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pact_fast.errors import PactError
from pact_fast.files import io_errors, write_text
from pact_fast.text import first_difference

FAILURES_PER_PAGE = 300  # as many as `pact-fast view` shows on one page
CURE = "free some space or make the folder writable, and start the same command again"


@dataclass(frozen=True)
class Sample:
    """One finished sample of one task.

    task         id of the task
    category     of the task
    sample       number of the sample, from 0
    rewards      of the environment, by name; `success` is the score
    stop_reason  why the trajectory ended; "prompt_too_long": it never began
    turns        assistant turns
    tokens       sampled tokens
    page         N of the file rollouts/eval_N.jsonl that holds the trajectory; None for a success
    """

    task: str
    category: str
    sample: int
    rewards: dict[str, float] = field(default_factory=dict)
    stop_reason: str = ""
    turns: int = 0
    tokens: int = 0
    page: int | None = None

    @property
    def success(self) -> float:
        return self.rewards.get("success", 0.0)


class ResultStore:
    """The folder of one evaluation; used by one process at a time.

    Args:
        folder: Created if it is not there.
        settings: JSON data that every sample depends on.

    Raises:
        PactError: The folder holds samples of other settings, or something else; or it cannot be written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self._results = folder / "results.jsonl"
        settings = json.loads(json.dumps(settings))
        with io_errors(folder, CURE):
            (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        known = _read_object(folder / "settings.json")
        if known is None:
            if self._results.exists():
                raise PactError(f"{folder} holds results without settings.json; name another folder with --out")
            write_text(folder / "settings.json", json.dumps(settings, indent=2) + "\n", CURE)
        elif difference := first_difference(known, settings):
            raise PactError(
                f"{folder} holds results with other settings: {difference}; name another folder with --out, or delete it"
            )
        self._done: dict[tuple[str, int], Sample] = {}
        self._read()

    def __contains__(self, key: tuple[str, int]) -> bool:
        """Whether the sample (task id, number) is finished."""
        return key in self._done

    def samples(self, keys: Iterable[tuple[str, int]]) -> list[Sample]:
        """The finished ones among the samples (task id, number)."""
        return [self._done[key] for key in keys if key in self._done]

    def add(self, sample: Sample, record: dict[str, Any] | None = None) -> None:
        """Write a finished sample, after the record of its trajectory if that is to be kept."""
        if record is not None:
            page = self._failures // FAILURES_PER_PAGE
            sample = Sample(**{**asdict(sample), "page": page})
            self._append(self.folder / "rollouts" / f"eval_{page:06d}.jsonl", {**record, "step": page})
            self._failures += 1
        self._append(self._results, asdict(sample))
        self._done[sample.task, sample.sample] = sample

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n", CURE)

    def _append(self, path: Path, value: dict[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with io_errors(path, CURE), path.open("ab") as file:
            file.write(line)

    def _read(self) -> None:
        """Read the finished samples, and remove incomplete lines from the files."""
        self._failures = 0
        kept = []
        for value in _read_lines(self._results):
            try:
                sample = Sample(**value)
            except TypeError:
                raise PactError(f"{self._results} is not a results file; name another folder with --out") from None
            self._done[sample.task, sample.sample] = sample
            kept.append(asdict(sample))
            self._failures += sample.page is not None
        if kept:
            _rewrite(self._results, kept)
        wanted = {(sample.page, sample.task, sample.sample) for sample in self._done.values()}
        for path in (self.folder / "rollouts").glob("eval_*.jsonl"):
            records = _read_lines(path)
            if any((r.get("step"), r.get("task_id"), r.get("sample")) not in wanted for r in records):
                _rewrite(path, [r for r in records if (r.get("step"), r.get("task_id"), r.get("sample")) in wanted])


def _rewrite(path: Path, values: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), CURE)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; a line that is none (the end of an interrupted write) is left out."""
    if not path.exists():
        return []
    found = []
    with io_errors(path, CURE), path.open("rb") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                found.append(value)
    return found


def _read_object(path: Path) -> dict[str, Any] | None:
    found = path.exists() and path.read_bytes()
    try:
        value = json.loads(found) if found else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else None
