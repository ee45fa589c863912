"""BFCL's tasks as Tasks: prompts, tools, expert traces from the ground truth, and the split into training and held-out ones.

The split is fixed: `is_held_out`. The four multi-turn categories ask the same 200 questions in four ways, so all variants
of a question are on the same side; so are the live tasks that share a function document.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall
from pact_fast.envs.bfcl.ast_match import mismatch
from pact_fast.envs.bfcl.calls import read_call
from pact_fast.envs.bfcl.entries import MULTI_TURN, UNANSWERED, Entry, entries
from pact_fast.envs.bfcl.prompts import RECORDED, first_messages, user_message
from pact_fast.envs.bfcl.schemas import tool_schema
from pact_fast.envs.bfcl.session import ApiSession

DONE = "Done."
CANNOT = "I cannot do this with the functions and the information that I have."


class BfclTasks:
    """A TaskSource over categories, with expert traces.

    Args:
        categories: Names; None: the multi-turn ones.
        seed: Seed of the order in each epoch.
        format: See `Bfcl`.

    Raises:
        PactError: A category is unknown or refused, or the package is missing.
    """

    def __init__(self, categories: Sequence[str] | None, seed: int, format: str = "json"):
        chosen = [list(entries(name).values()) for name in categories or MULTI_TURN]
        self._train = [found for members in chosen for found in members if not is_held_out(found.id)]
        held_out = [[found for found in members if is_held_out(found.id)] for members in chosen]
        # the first of each category, then the second of each: any number of tasks covers all categories
        self._held_out = [
            members[i] for i in range(max(map(len, held_out))) for members in held_out if i < len(members)
        ]
        self._seed, self._format = seed, format
        self._made: dict[str, Task] = {}

    def train(self, step: int, count: int) -> list[Task]:
        return [self._task(self._at(position)) for position in range(step * count, (step + 1) * count)]

    def held_out(self, count: int) -> list[Task]:
        return [self._task(found) for found in self._held_out[:count]]

    def _at(self, position: int) -> Entry:
        epoch, index = divmod(position, len(self._train))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._train))
        return self._train[order[index]]

    def _task(self, found: Entry) -> Task:
        if found.id not in self._made:
            self._made[found.id] = make_task(found, self._format, expert=True)
        return self._made[found.id]


def is_held_out(task_id: str) -> bool:
    """Whether a task is held out, about one in four: crc32 of its group and number, modulo 4, is 0.

    The group is `multi_turn` for the multi-turn categories, else the category; the number is that of the question, for
    live tasks that of the function document (`live_simple_19-3-15`: 3).
    """
    category, _, index = task_id.rpartition("_")
    parts = index.split("-")
    group = "multi_turn" if category in MULTI_TURN else category
    return zlib.crc32(f"{group}/{parts[1] if len(parts) > 1 else parts[0]}".encode()) % 4 == 0


def make_task(entry: Entry, format: str = "json", *, expert: bool = False) -> Task:
    """The Task of an entry. `expert`: with the expert trace and the reference calls (format `json` only)."""
    trace = expert_trace(entry) if expert and format == "json" else None
    # a row's tools apply to its whole trace; if functions come late, the environment lists the offered ones
    listed = format == "json" and not entry.late
    return Task(
        id=entry.id,
        prompt=first_messages(entry, format),
        tools=[tool_schema(function) for function in entry.functions] if listed else [],
        expert=trace,
        reference_calls=trace.calls if trace else None,
        env="bfcl",
        env_args={"id": entry.id},
    )


def expert_trace(entry: Entry) -> ExpertTrace | None:
    """The ground truth, executed; None where the benchmark has none."""
    if entry.multi_turn:
        return _multi_turn_trace(entry)
    return None if entry.category in UNANSWERED else _single_turn_trace(entry)


def _multi_turn_trace(entry: Entry) -> ExpertTrace:
    """One assistant turn per call, then one without calls, which the user's next message follows."""
    session = ApiSession(entry)
    turns: list[ExpertTurn] = []
    last = len(entry.truth) - 1
    for number, truth in enumerate(entry.truth):
        for text in truth:
            call = read_call(text)
            observation = session.run(call.name, call.args, call.kwargs)
            named = dict(zip(session.parameters(call.name), call.args, strict=False)) | call.kwargs
            turns.append(ExpertTurn("", (ToolCall(call.name, _json(named)),), (observation,)))
        if number < last:
            said = DONE if truth else CANNOT
            turns.append(ExpertTurn("", (), (), said, user=user_message(entry, number + 1, "json")))
    return ExpertTrace(tuple(turns), DONE if entry.truth[last] else CANNOT)


def _single_turn_trace(entry: Entry) -> ExpertTrace | None:
    """The first accepted value of every argument; None if these do not pass (variables instead of values, for example)."""
    calls = [
        ToolCall(name, _json({key: _pick(values) for key, values in arguments.items() if _given(values)}))
        for expected in entry.truth
        for name, arguments in expected.items()
    ]
    if mismatch(entry.category, entry.functions, [{c.name: c.arguments} for c in calls], entry.truth) is not None:
        return None
    return ExpertTrace((ExpertTurn("", tuple(calls), (RECORDED,) * len(calls)),), DONE)


def _given(values: Any) -> bool:
    """Whether an argument is written: it has an accepted value besides being left out. Deep inside, values stand bare."""
    return not isinstance(values, list) or any(value != "" for value in values)


def _pick(values: Any) -> Any:
    """The first accepted value. Dicts list the accepted values of their keys in turn."""
    return _plain(next((value for value in values if value != ""), "") if isinstance(values, list) else values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pick(values) for key, values in value.items() if _given(values)}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _json(value: Any) -> Any:
    """A copy as JSON data: tuples become lists."""
    return json.loads(json.dumps(value))
