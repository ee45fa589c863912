"""Files of rollouts: JSON lines, compressed by gzip, and an index of how many each file holds.

    rollouts/step_000012.jsonl.gz   the rollouts of a training step; also eval_N and skipped_N
    rollouts/index.jsonl            {"file", "bytes", "rollouts"} for every file when it was written; the last line counts

Files without `.gz` are read as well. The index saves reading what is only counted: a file that it does not know, or that
has another size, is counted by reading it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pact_fast.files import io_errors, write_bytes

INDEX = "index.jsonl"
LEVEL = 6  # of gzip; 9 takes three times as long for 2 % less
KEEP_EVERY = 10  # of the steps that are not all kept, one in so many
NAME = re.compile(r"(step|eval|skipped)_(\d+)\.jsonl(\.gz)?")


def write_rollout_file(folder: Path, name: str, lines: Sequence[str]) -> None:
    """Write `folder/name.jsonl.gz` whole or not at all, and note it in the index. PactError if that fails."""
    path = folder / f"{name}.jsonl.gz"
    data = gzip.compress("".join(lines).encode("utf-8", "replace"), LEVEL, mtime=0)  # the same lines, the same bytes
    with io_errors(path):
        write_bytes(path, data)
        (folder / f"{name}.jsonl").unlink(missing_ok=True)  # of a version that did not compress
        with (folder / INDEX).open("a", encoding="utf-8") as index:
            index.write(json.dumps({"file": path.name, "bytes": len(data), "rollouts": len(lines)}) + "\n")


def thin_out(folder: Path, step: int, keep: int | None) -> None:
    """Remove the training rollouts of the step that is `keep` steps before `step`, unless it is a multiple of KEEP_EVERY.

    Called after every step, this leaves the newest `keep` steps and every tenth of those before them.
    """
    old = step - keep if keep is not None else 0
    if old > 0 and old % KEEP_EVERY:
        path = folder / f"step_{old:06d}.jsonl.gz"
        with io_errors(path):
            path.unlink(missing_ok=True)


def rollout_files(folder: Path, kinds: Sequence[str], step: int | None = None) -> list[tuple[int, Path]]:
    """(step, file) of the files of these kinds, by step and then kind; those of `step` alone if it is given."""
    found = []
    for path in folder.glob("*.jsonl*"):
        match = NAME.fullmatch(path.name)
        if match and match[1] in kinds and step in (None, int(match[2])):
            found.append((int(match[2]), path))
    return sorted(found, key=lambda entry: (entry[0], kinds.index(entry[1].name.split("_")[0]), entry[1].name))


def read_index(folder: Path) -> dict[str, tuple[int, int]]:
    """File name → (bytes, rollouts), as far as the index can be read."""
    known: dict[str, tuple[int, int]] = {}
    path = folder / INDEX
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            known[str(entry["file"])] = int(entry["bytes"]), int(entry["rollouts"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a process was killed while it wrote the line
    return known


def count_rollouts(path: Path, index: dict[str, tuple[int, int]]) -> int:
    """Number of rollouts in a file."""
    size, count = index.get(path.name, (-1, 0))
    return count if size == path.stat().st_size else sum(1 for _ in read_lines(path))


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, compressed or not; they end where it is damaged."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return
