"""The check after every user turn of a multi-turn task: the official checker's verdict, from objects instead of texts.

A turn passes if its ground truth has no calls; else if the policy made a call, every public attribute of every object
equals that of the objects to which the ground truth was done, and the results of the turn's ground truth are among all
results so far, each as often.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pact_fast.envs.bfcl.calls import read_call
from pact_fast.envs.bfcl.entries import Entry
from pact_fast.envs.bfcl.session import ApiSession


@dataclass
class MultiTurnVerdict:
    """Judges an episode turn by turn.

    failure      reason of the first turn that failed, None so far
    failed_turn  index of that turn
    turn         index of the turn under way
    """

    entry: Entry
    failure: str | None = None
    failed_turn: int | None = None
    turn: int = 0
    _truth: ApiSession = field(init=False)
    _results: list[str] = field(default_factory=list)
    _called: bool = False

    def __post_init__(self) -> None:
        self._truth = ApiSession(self.entry)

    @property
    def finished(self) -> bool:
        """Whether all turns have ended."""
        return self.turn >= len(self.entry.truth)

    @property
    def valid(self) -> bool:
        """Whether all turns have ended and passed."""
        return self.finished and self.failure is None

    def add(self, result: str) -> None:
        """The policy made a call, with this result."""
        self._called = True
        self._results.append(result)

    def end_turn(self, session: ApiSession) -> None:
        """Check the turn under way and begin the next."""
        if self.failure is None and not self.finished:
            self.failure = self._check(session)
            self.failed_turn = self.turn if self.failure else None
        self.turn += 1
        self._called = False

    def _check(self, session: ApiSession) -> str | None:
        expected = self.entry.truth[self.turn]
        results = []
        for text in expected:
            call = read_call(text)
            results.append(self._truth.run(call.name, call.args, call.kwargs))
        if not expected:
            return None
        if not self._called:
            return f"turn {self.turn}: no call was made"
        for name, instance in self._truth.instances.items():
            if changed := difference(session.instances[name], instance):
                return f"turn {self.turn}: the state of {name} differs in {changed}"
        missing = Counter(results) - Counter(self._results)
        if missing:
            return f"turn {self.turn}: {missing.total()} expected results are missing"
        return None


def difference(instance: Any, expected: Any) -> str | None:
    """The first public attribute that differs, or None. Objects that cannot be compared differ."""
    for name, value in vars(expected).items():
        if name.startswith("_"):
            continue
        try:
            if getattr(instance, name) != value:
                return name
        except (RecursionError, AttributeError):  # a folder was copied into itself
            return name
    return None
