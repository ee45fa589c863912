"""`pact-fast data convert BENCH`: write a benchmark's tasks as rows of our own columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pact_fast.config.load import config_from
from pact_fast.data.readers import write_tasks
from pact_fast.evaluation.benchmark import Split, benchmark


def convert_command(
    name: str, settings: Sequence[str], out: Path, categories: list[str] | None, split: Split, limit: int | None
) -> int:
    """Write the rows and print how many there are.

    Args:
        name: The benchmark, or `file.py:Class`.
        settings: `key=value`, such as data.eval=FILE where the benchmark reads a file.
        out: JSONL file.
        categories: Names; None: all.
        split: `train`, `test` or `all`.
        limit: Most rows per category.

    Raises:
        PactError: Data is missing, the split does not exist, or the file cannot be written.
    """
    kind = benchmark.get(name)
    config = config_from({"model": {"path": "none"}}, (*kind.settings, *settings), name)  # no model is read
    bench = kind(config)
    rows = [task for category in kind.choose(categories) for task in bench.rows(category, split)[:limit]]
    write_tasks(out, rows)
    traces = sum(task.expert is not None for task in rows)
    print(f"{len(rows)} rows written to {out}, {traces} with an expert trace")
    return 0
