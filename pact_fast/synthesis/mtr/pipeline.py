"""A file of QA rows to a folder of tasks with verified traces. Killed at any moment and started again, it gives the same files.

    train.jsonl     tasks with a trace; `pact-fast train` reads them
    tasks.jsonl     tasks with tools and without a trace: for rollouts, or for traces of a teacher
    rejected.jsonl  {id, reasons} of every other row
    tools.json      every tool with its frequency, and the merged and rejected ones
    report.html     acceptance by reason, tools, a trace to read
    manifest.json   settings, digest of the input, counts; written last

What a row gives depends on the row and the settings alone. While it works, the results of finished rows stand in
`journal.jsonl`, in the order of the input.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pact_fast.data.readers import write_tasks
from pact_fast.envs.simulated.env import make_actor
from pact_fast.envs.simulated.world import LOOKUP, MODEL, SEARCH
from pact_fast.errors import DataError
from pact_fast.files import OTHER_FILE_CURE, io_errors, remove, write_text
from pact_fast.synthesis.journal import JOURNAL, Journal
from pact_fast.synthesis.mtr.make_task import MadeTask, make_task
from pact_fast.synthesis.mtr.model_tool_maker import ModelToolMaker
from pact_fast.synthesis.mtr.page import write_page
from pact_fast.synthesis.mtr.readers import read_rows
from pact_fast.synthesis.mtr.tool_maker import make_tools
from pact_fast.synthesis.mtr.verify import MAX_TURNS
from pact_fast.synthesis.ordered import ordered

VERSION = 2  # of the output of a row
MANIFEST = "manifest.json"
UNREADABLE = "unreadable"  # the reason of a row that no reader accepts


@dataclass(frozen=True)
class Settings:
    """Settings that the result depends on, besides the rows.

    max_rows   read only this many rows; None: all
    max_turns  longest trace that is kept, in assistant turns
    faults     of the tools (`env.args.faults`)
    """

    max_rows: int | None = None
    max_turns: int = MAX_TURNS
    faults: dict[str, float] | None = None


def make_dataset(
    source: Path,
    out: Path,
    settings: Settings,
    progress: Callable[[int, int], None] = lambda done, kept: None,
    tool_maker: ModelToolMaker | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Make the files of `out` from a file of QA rows. Returns the manifest.

    Args:
        source: The file.
        out: The output folder. An interrupted call is continued there.
        settings: What else decides the result.
        progress: Called after every row with (rows done, traces kept).
        tool_maker: A language model that makes the tools of rows without a plan; None: the rules do.
        workers: Rows at the same time.

    Raises:
        DataError: The file cannot be read, or holds no rows.
        PactError: The folder holds the work of another file or other settings, or cannot be written; or an LLMError.
    """
    identity = {"version": VERSION, "settings": asdict(settings), "sha256": _digest(source)}
    if tool_maker:
        identity["tool_maker"] = tool_maker.version
    journal = Journal(out, identity, MANIFEST)
    if journal.summary is not None:
        return journal.summary
    actor = make_actor({"faults": settings.faults or {}})
    without_plan = tool_maker.make if tool_maker else make_tools

    def record(row: Any) -> dict[str, Any]:
        if isinstance(row, dict):  # it cannot be read
            return row
        return _record(make_task(row, actor, settings.max_turns, without_plan=without_plan))

    with journal:
        rows = islice(_rows(source, settings.max_rows), len(journal.records), None)
        for made in ordered(record, rows, workers):
            journal.add(made)
            progress(len(journal.records), journal.kept)
    if not journal.records:
        raise DataError("holds no rows; give a file with at least one", file=str(source))
    manifest = _write(out, identity, journal.records)
    with io_errors(out, OTHER_FILE_CURE):
        remove(out / JOURNAL)
    return manifest


def _digest(source: Path) -> str:
    if not source.is_file():
        raise DataError("no such file; name a file of QA rows", file=str(source))
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(source: Path, limit: int | None) -> Iterator[Any]:
    """Rows; a row that cannot be read is its record."""
    errors: list[DataError] = []
    count = 0
    for row in read_rows(source, errors.append):
        for error in errors:
            if limit is None or count < limit:
                count += 1
                yield _unreadable(error)
        errors.clear()
        if limit is not None and count >= limit:
            return
        count += 1
        yield row
    yield from (_unreadable(error) for error in errors[: None if limit is None else limit - count])


def _unreadable(error: DataError) -> dict[str, Any]:
    return {
        "id": None,
        "reasons": [UNREADABLE],
        "error": str(error),
        "class": "",
        "tools": [],
        "made": 0,
        "rejected": [],
    }


def _record(made: MadeTask) -> dict[str, Any]:
    """Return the parts of a row that the output files need, as JSON data."""
    task, tools = made.task, made.tools
    schemas = [
        [tool.name, tool.kind, sorted(tool.parameters.get("properties", {}))] for tool in tools.world.tools.values()
    ]
    record: dict[str, Any] = {
        "id": task.id,
        "reasons": list(made.reasons),
        "class": made.task_class,
        "tools": schemas,
        "made": tools.made,
        "rejected": [[tool.name, list(tool.reasons)] for tool in tools.rejected],
        "question": task.prompt[-1]["content"],
    }
    if any(tool.kind in (LOOKUP, SEARCH, MODEL) for tool in tools.world.tools.values()):  # it can find something out
        record["task"] = task_json(task)
    return record


def task_json(task: Any) -> dict[str, Any]:
    """A task as JSON, from which `_task` makes an equal one."""
    columns = ("id", "prompt", "tools", "answer", "env", "env_args", "columns")
    data = {name: getattr(task, name) for name in columns}
    return data | ({"expert": task.expert.to_messages()} if task.expert else {})


def _task(data: dict[str, Any]) -> Any:
    from pact_fast.data.types import ExpertTrace, Task

    task = Task(**{name: value for name, value in data.items() if name != "expert"})
    if "expert" not in data:
        return task
    expert = ExpertTrace.from_messages(data["expert"])
    return replace(task, expert=expert, reference_calls=expert.calls)


def _write(out: Path, identity: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kept = [record for record in records if not record["reasons"]]
    _write_tasks(out / "train.jsonl", [_task(record["task"]) for record in kept])
    bare = [record["task"] for record in records if record["reasons"] and "task" in record]
    _write_tasks(out / "tasks.jsonl", [_task(task) for task in bare])
    rejected = [{k: r[k] for k in ("id", "reasons", "error") if k in r} for r in records if r["reasons"]]
    write_text(
        out / "rejected.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rejected), OTHER_FILE_CURE
    )
    tools = tool_table(records)
    write_text(out / "tools.json", json.dumps(tools, indent=1, ensure_ascii=False) + "\n", OTHER_FILE_CURE)
    manifest = {
        "made_from": identity,
        "rows": len(records),
        "kept": len(kept),
        "without_trace": len(bare),
        "reasons": dict(Counter(reason for r in records for reason in r["reasons"]).most_common()),
        "classes": dict(Counter(r["class"] for r in kept).most_common()),
        "tools": len(tools["tools"]),
    }
    write_page(out / "report.html", manifest, tools, kept[0]["task"] if kept else None)
    write_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n", OTHER_FILE_CURE)
    return manifest


def _write_tasks(path: Path, tasks: Sequence[Any]) -> None:
    """`write_tasks`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_tasks(temporary, tasks)
    with io_errors(path, OTHER_FILE_CURE):
        temporary.replace(path)


def tool_table(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tools by frequency, and counts of made, merged and rejected ones."""
    counts = Counter((name, kind, tuple(parameters)) for r in records for name, kind, parameters in r["tools"])
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    task_tools = sum(kind == "lookup" for r in records for _, kind, _ in r["tools"])
    rejected = Counter(reason for r in records for _, reasons in r["rejected"] for reason in reasons)
    made = sum(r["made"] for r in records)
    return {
        "tools": [{"name": n, "kind": k, "parameters": list(p), "tasks": c} for (n, k, p), c in rows],
        "interfaces_written": made,
        "merged": made - task_tools - sum(len(r["rejected"]) for r in records),
        "rejected": dict(rejected.most_common()),
        "power_law_r2": power_law_r2([c for (_, kind, _), c in rows if kind == "lookup"]),
    }


def power_law_r2(frequencies: Sequence[int]) -> float | None:
    """R² of log frequency against log rank, as a straight line; None for fewer than three frequencies, or equal ones."""
    if len(frequencies) < 3 or len(set(frequencies)) < 2:
        return None
    ordered = sorted(frequencies, reverse=True)
    x, y = np.log(np.arange(1, len(ordered) + 1)), np.log(np.array(ordered, float))
    r = float(np.corrcoef(x, y)[0, 1])
    return None if math.isnan(r) else round(r * r, 4)
