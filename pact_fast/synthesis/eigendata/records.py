"""Candidates as lines of a file: appended while the engine runs, and read again when it continues."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pact_fast.envs.domain import Instance
from pact_fast.envs.domain.controls import Finding
from pact_fast.files import io_errors
from pact_fast.synthesis.eigendata.roles import Candidate, Rollout
from pact_fast.synthesis.eigendata.versions import CURE


class CandidateLog:
    """The file of all candidates. A slot's attempts are written together, and the last of them says so.

    Args:
        path: The file. What a killed process has left incomplete is cut off.
    """

    def __init__(self, path: Path):
        self._path = path
        self.candidates: list[Candidate] = []
        self._read()
        with io_errors(path, CURE):
            self._file = path.open("a", encoding="utf-8")

    def write(self, slot: Sequence[Candidate]) -> None:
        """Append the attempts of a slot."""
        lines = [json.dumps({**to_json(c), "last": c is slot[-1]}, ensure_ascii=False, default=str) for c in slot]
        with io_errors(self._path, CURE):
            self._file.write("".join(f"{line}\n" for line in lines))
            self._file.flush()
        self.candidates += slot

    def sync(self) -> None:
        """Flush to disk."""
        with io_errors(self._path, CURE):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _read(self) -> None:
        if not self._path.exists():
            return
        complete, position, slot = 0, 0, []
        with self._path.open("rb") as file:
            for line in file:
                position += len(line)
                try:
                    value = json.loads(line)
                    slot.append(from_json(value))
                except (ValueError, KeyError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                if value["last"]:
                    self.candidates += slot
                    complete, slot = position, []
        with io_errors(self._path, CURE):
            os.truncate(self._path, complete)


def to_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON. Dialogues are kept of accepted tasks and of those that failed after a dialogue."""
    return {
        "round": candidate.round,
        "plan": candidate.plan,
        "slot": candidate.slot,
        "attempt": candidate.attempt,
        "version": candidate.version,
        "accepted": candidate.accepted,
        "stage": candidate.stage,
        "score": candidate.score,
        "findings": [asdict(finding) for finding in candidate.findings],
        "instance": candidate.instance and candidate.instance.to_json(),
        "rollout": candidate.rollout and asdict(candidate.rollout),
    }


def from_json(value: dict[str, Any]) -> Candidate:
    """The inverse of `to_json`."""
    return Candidate(
        round=value["round"],
        plan=value["plan"],
        slot=value["slot"],
        attempt=value["attempt"],
        version=value["version"],
        accepted=value["accepted"],
        stage=value["stage"],
        score=value["score"],
        findings=[Finding(**finding) for finding in value["findings"]],
        instance=Instance.from_json(value["instance"]) if value["instance"] else None,
        rollout=Rollout(**value["rollout"]) if value["rollout"] else None,
    )
