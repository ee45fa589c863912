"""Answers on disk, a file for each, named by the hash of its request.

A file is written beside its place, flushed, and linked to its name, which fails if the name is taken: the first writer
wins, other processes read its file, and a kill at any moment leaves no half answer. Files need no locks, no
recovery and no server, work on network file systems, and can be read, copied and deleted one by one; a database would
write faster than models answer, which nobody needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pact_fast.errors import PactError
from pact_fast.files import io_errors
from pact_fast.llm.answers import Answer
from pact_fast.llm.request import FORMAT

STALE = 24 * 3600  # seconds after which an unlinked file counts as the leftover of a killed process
CURE = "free some space or make the folder writable, and start again: answers that are there are kept"


class AnswerCache:
    """Answers in a folder, which processes of one machine, or of several on one file system, may share."""

    def __init__(self, folder: Path):
        self._folder, self._unlinked = folder, folder / "tmp"
        with io_errors(folder, CURE):
            self._unlinked.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def get(self, key: str) -> Answer | None:
        """The answer to a request; None if there is none. PactError if the file is damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PactError(f"cannot read {path}: {error.strerror}; make it readable, or remove it") from None
        try:
            entry = json.loads(data)
            if entry["format"] != FORMAT or entry["key"] != key:
                raise ValueError
            answer = entry["answer"]
            answer["tool_calls"] = [(str(name), str(arguments)) for name, arguments in answer["tool_calls"]]
            found = Answer(**answer)
            if not _is_valid(found):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PactError(f"{path} is damaged; remove it, and the model is asked again") from None
        return found

    def put(self, key: str, answer: Answer, role: str, request: dict[str, Any]) -> Answer:
        """Keep an answer, and return the one that is kept: another writer may have been first.

        Args:
            key: Hash of the request.
            answer: The answer.
            role: The role that asked, for readers of the file.
            request: The request, likewise.
        """
        entry = {"format": FORMAT, "key": key, "role": role, "request": request, "answer": asdict(answer)}
        data = json.dumps(entry, indent=1).encode("ascii")
        path = self._path(key)
        with io_errors(path, CURE):
            path.parent.mkdir(exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._unlinked)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(descriptor)
                try:
                    os.link(name, path)
                    return answer
                except FileExistsError:
                    pass
            finally:
                os.unlink(name)
        kept = self.get(key)
        return answer if kept is None else kept

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:]}.json"

    def _sweep(self) -> None:
        now = time.time()
        for path in self._unlinked.iterdir():
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > STALE:
                    path.unlink()


def _is_valid(answer: Answer) -> bool:
    texts = (answer.text, answer.reasoning, answer.finish_reason)
    counts = (answer.prompt_tokens, answer.completion_tokens)
    return all(isinstance(text, str) for text in texts) and all(type(count) is int and count >= 0 for count in counts)
