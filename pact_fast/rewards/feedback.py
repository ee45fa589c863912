"""Feedback of tools during a trajectory, without the echoes of their arguments (docs/method.md, section 7).

A tool often repeats its arguments: "no data for 1987". If only the text were scored, such an answer would contain every
guess of the policy, and a call with 160 guesses in one argument would contain the expected text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pact_fast.data.types import ToolCall, Trajectory

ERROR_TEXT = re.compile(r"[\w.]*(?:error|exception)\s*:|.*^traceback \(most recent call last\)", re.I | re.M | re.S)
ERROR_OBJECT = re.compile(r"""\{\s*(["'])errors?\1\s*:\s*+(?!null|none|false|""|''|\[\s*]|\{\s*}|[-\d.])""", re.I)
CUT_NOTE = re.compile(r"(?:… \[cut(?: at|:) [\d,]+ characters])+\s*\Z")  # of the tool pool, and of the chat renderer


def is_error(observation: str) -> bool:
    """Whether an observation reports a failure. All of these do:

    - `error: …` (every failure of `python_tools`, and of the agent loop), `Error: …`, `KeyError: …`
    - a Python traceback
    - an object with a text, list, object or true under `error` or `errors`, as JSON or as Python writes it, also if
      its end is cut off; or, in JSON, with `"status": "error"`

    `{"error": null, …}` and `{"error": 0.05, …}` (a margin of error) do not.
    """
    text = observation.strip()
    if ERROR_TEXT.match(text) or ERROR_OBJECT.match(text):
        return True
    if not text.startswith("{"):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    status = value.get("status")
    reported = [value[key] for key in value if key.lower() in ("error", "errors")]
    return any(isinstance(v, str | list | dict | bool) and v for v in reported) or (
        isinstance(status, str) and status.lower() == "error"
    )


@dataclass(frozen=True)
class Feedback:
    """One call and its observation.

    tool         name; "" for a malformed call
    observation  as the policy saw it
    arguments    of the call
    turn         index of its turn
    """

    tool: str
    observation: str
    arguments: dict[str, Any]
    turn: int = 0

    @cached_property
    def text(self) -> str:
        """The tool's text in the form that is scored: normalised, without our note of a cut; empty for an error."""
        return "" if is_error(self.observation) else normalise(CUT_NOTE.sub("", self.observation))

    def repeats(self, part: str) -> bool:
        """Whether an argument, or a key in one, contains the part; letters and digits alone are compared."""
        sought = _letters(part)
        return any(sought in argument for argument in self._arguments) if sought else self._repeats_symbols(part)

    def _repeats_symbols(self, part: str) -> bool:
        return any(part in normalise(text) for text in _texts(self.arguments))

    @cached_property
    def _arguments(self) -> list[str]:
        return [_letters(text) for text in _texts(self.arguments)]


def trajectory_feedback(trajectory: Trajectory) -> list[Feedback]:
    """All calls that have an observation, in order. What the policy wrote around them is in none."""
    return [
        Feedback(attempt.name, observation, attempt.arguments, index)
        if isinstance(attempt, ToolCall)
        else Feedback("", observation, {}, index)
        for index, turn in enumerate(trajectory.turns)
        # not strict: calls of the last turn may have no observations
        for attempt, observation in zip(turn.attempts, turn.observations, strict=False)
    ]


def stated(feedback: Sequence[Feedback], part: str) -> list[bool]:
    """For every call, whether its tool states the part: a normalised text without commas.

    The part must occur in an observation that is no error. If an argument of the call contains it, it is an echo, and
    does not count unless a tool stated it in an earlier turn: then the policy has it from there.
    """
    found: list[bool] = []
    first: int | None = None  # turn in which the part was first stated
    for call in feedback:
        said_before = first is not None and first < call.turn
        found.append(part in call.text and (said_before or not call.repeats(part)))
        if found[-1] and first is None:
            first = call.turn
    return found


def normalise(text: str) -> str:
    """The form in which texts are compared: lower case, no commas, no blanks around."""
    return text.lower().replace(",", "").strip()


def _letters(text: str) -> str:
    """The letters and digits of a text, in one form of Unicode, without case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def _texts(value: Any) -> Iterator[str]:
    """Strings, numbers and keys inside JSON data."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            pending += item
        elif isinstance(item, str | int | float) and not isinstance(item, bool):
            yield str(item)
