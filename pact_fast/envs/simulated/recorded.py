"""Stored observations: one per key, the first that was written; and the backend that only replays them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from pact_fast.envs.simulated.backend import ToolFailure, ToolRequest
from pact_fast.files import OTHER_FILE_CURE, io_errors

IN_MEMORY = 65536  # observations of a store without a file; the oldest are dropped, since they can be computed again


class ObservationStore:
    """Observations by key. The first writer of a key wins, among threads, processes and ranks that share the file.

    writer  version of actor and backend that wrote the first one; None: the store is empty, or has no file

    Args:
        path: A JSONL file of {key, observation, writer}, which is appended to; None: in memory only. A line that a killed
            process left unfinished is skipped.

    Raises:
        PactError: The file cannot be read or written.
    """

    def __init__(self, path: Path | None = None):
        self._path, self._known, self._read = path, dict[str, str](), 0
        self.writer: str | None = None
        self._lock = threading.Lock()
        if path is not None:
            with io_errors(path, OTHER_FILE_CURE):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab+") as file:
                    self._catch_up(file)

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def put(self, key: str, observation: str, writer: str) -> str:
        """Store an observation. Returns the one that stands under the key: that of the first writer.

        `writer`: version of actor and backend.
        """
        with self._lock:
            if self._path is None:
                while len(self._known) >= IN_MEMORY:
                    del self._known[next(iter(self._known))]
                return self._known.setdefault(key, observation)
            with io_errors(self._path, OTHER_FILE_CURE), self._path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                complete = self._catch_up(file)
                if key not in self._known:
                    line = json.dumps({"key": key, "observation": observation, "writer": writer}).encode() + b"\n"
                    file.write(line if complete else b"\n" + line)
                    file.flush()
                    os.fsync(file.fileno())
                    self._catch_up(file)
            return self._known[key]

    def _catch_up(self, file: Any) -> bool:
        """Read the lines appended since the last read. Returns whether the file ends with a whole line."""
        file.seek(self._read)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self._known.setdefault(entry["key"], entry["observation"])
                self.writer = self.writer or str(entry.get("writer"))
            except (ValueError, KeyError, TypeError):
                continue  # cut by a killed process
        return len(whole) == len(data)


class ReplayBackend:
    """Answers nothing itself: with it, only observations of the store are given, and a miss is the error `not_recorded`."""

    deterministic = True
    blocking = False

    version = "replay"

    def respond(self, request: ToolRequest) -> Any:
        raise ToolFailure("not_recorded", "this call was never recorded")


def store_key(task_id: str, version: str, tool: str, arguments: dict[str, Any], state: str) -> str:
    """The key of an observation.

    Args:
        task_id: Id of the task.
        version: Of actor and backend.
        tool: Name of the tool.
        arguments: In any order.
        state: Digest of the earlier calls, for a stateful tool; else "".
    """
    parts = [task_id, version, tool, canonical(arguments), state]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON text with sorted keys; 3.0 is 3."""
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
