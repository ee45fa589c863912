"""Execution of an instance's checker: final state against that of the gold calls, assertions, required statements."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pact_fast.envs.domain.base import Domain
from pact_fast.envs.domain.database import Database, Record
from pact_fast.envs.domain.instance import Instance, Rule, Step
from pact_fast.envs.domain.tools import call_tool
from pact_fast.text import short


class Sandbox(Protocol):
    """Runs Python source of strangers; `envs/python_tools/pool.py : SandboxPool` is one."""

    def call(self, source: str, function: str, arguments: dict[str, Any], timeout: float | None = None) -> str:
        """Execute `source` and return what `function(**arguments)` returns, as text; `timeout` in seconds."""


@dataclass
class Replay:
    """Effects of the calls of an episode.

    db            the state after them
    observations  one per call
    carried_out   whether the call succeeded, one per call
    changed       whether the call changed the state, one per call; empty unless it was asked for
    """

    db: Database
    observations: list[str] = field(default_factory=list)
    carried_out: list[bool] = field(default_factory=list)
    changed: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """Whether an episode solved its task.

    difference  first difference between the final state and that of the gold calls; None: equal, or not compared
    failed      assertions that do not hold
    unsaid      texts that the agent has not told the user
    function    None: the checker's function holds, or there is none; else its result
    """

    difference: str | None = None
    failed: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()
    function: str | None = None

    @property
    def passed(self) -> bool:
        return self.difference is None and not self.failed and not self.unsaid and self.function is None

    @property
    def reason(self) -> str:
        """Reasons for the failure on one line; empty if the episode passed."""
        parts = [self.difference and f"state: {self.difference}", *(f"assertion: {text}" for text in self.failed)]
        parts += [f"not said: {text}" for text in self.unsaid]
        parts += [self.function and f"function: {self.function}"]
        return "; ".join(part for part in parts if part)


def initial_state(domain: Domain, instance: Instance) -> Database:
    """The state in which the episode begins. KeyError if an edit names a record that does not exist."""
    db = Database(domain.base)
    for edit in instance.init:
        db[edit.table][edit.key][edit.field] = edit.value
    return db


def run_step(domain: Domain, instance: Instance, db: Database, step: Step) -> tuple[str, bool]:
    """Make one call of the agent or the user.

    Args:
        domain: The domain, for its tools.
        instance: The task, for the user's device.
        db: The state; a call that is carried out may change it.
        step: The call.

    Returns:
        (observation, whether the call was carried out).
    """
    if step.by == "agent":
        return call_tool(domain.agent, db, step.name, step.arguments)
    return call_tool(domain.user, db, step.name, {"device": instance.user.device, **step.arguments})


def replay(domain: Domain, instance: Instance, steps: Iterable[Step], *, watch: bool = False) -> Replay:
    """Make calls from the beginning of the episode. A failed call changes nothing; the others are still made.

    Args:
        domain: The domain.
        instance: The task.
        steps: The calls, in their order.
        watch: Find out which calls change the state.
    """
    played = Replay(initial_state(domain, instance))
    before = played.db.digest() if watch else ""
    for step in steps:
        text, carried_out = run_step(domain, instance, played.db, step)
        played.observations.append(text)
        played.carried_out.append(carried_out)
        if watch:
            after = played.db.digest()
            played.changed.append(after != before)
            before = after
    return played


def judge(
    domain: Domain,
    instance: Instance,
    db: Database,
    said: Sequence[str],
    *,
    gold: Database | None = None,
    sandbox: Sandbox | None = None,
) -> Verdict:
    """The verdict on a final state.

    Args:
        domain: The domain of the instance.
        instance: The task.
        db: The final state.
        said: What the agent told the user, message by message.
        gold: The state after the gold calls; None: they are replayed.
        sandbox: Runs the checker's function, if it has one.

    Raises:
        ValueError: The checker has a function and there is no sandbox.
    """
    checker = instance.checker
    difference = None
    if checker.compare:
        gold = gold or replay(domain, instance, instance.gold).db
        difference = state_difference(db, gold, checker.normalise)
    failed = tuple(
        f"{item.predicate}({_arguments(item.arguments)}) is not {item.equals!r}"
        for item in checker.assertions
        if not _holds(domain, db, item.predicate, dict(item.arguments), item.equals)
    )
    heard = "\n".join(map(plain, said))
    unsaid = tuple(text for text in checker.say if not is_said(text, heard))
    return Verdict(difference, failed, unsaid, _run_function(checker.function, db, said, sandbox))


def state_difference(left: Database, right: Database, rules: Sequence[Rule]) -> str | None:
    """The first difference between two states of one base, up to `rules`; None if there is none."""
    a, b = left.changes(), right.changes()
    for table in sorted({*a, *b}):
        here = [rule for rule in rules if rule.table == table]
        if any(rule.how == "ignore" and rule.field is None for rule in here):
            continue
        for key in sorted({*a.get(table, ()), *b.get(table, ())}):
            mine, theirs = (_normal(_record(db, table, key), here) for db in (left, right))
            if mine != theirs:
                return f"{table}.{key} {_first_difference(mine, theirs)}"
    return None


def is_said(text: str, heard: str) -> bool:
    """Whether `heard` (as `plain` gives it) contains the text as whole words; numbers are compared by value."""
    return re.search(rf"(?<![\w.]){re.escape(plain(text))}(?!\w|\.\d)", heard) is not None


def plain(text: str) -> str:
    """Lower case, blanks collapsed, numbers in one spelling: $1,045.50 and 1045.5 are equal."""
    return re.sub(r"\d[\d,]*(?:\.\d+)?", _number, " ".join(text.lower().split()))


def _number(match: re.Match[str]) -> str:
    digits = match[0].rstrip(",")
    rest = match[0][len(digits) :]
    if digits.startswith("0") and len(digits) > 1 and "." not in digits:  # part of an id
        return match[0]
    value = digits.replace(",", "")
    return (value.rstrip("0").rstrip(".") if "." in value else value) + rest


def _record(db: Database, table: str, key: str) -> Record | None:
    return db[table].peek(key) if key in db[table] else None


def _normal(record: Record | None, rules: Sequence[Rule]) -> Record | None:
    if record is None or not rules:
        return record
    result = dict(record)
    for rule in rules:
        value = result.get(rule.field or "")
        if rule.how == "ignore":
            result.pop(rule.field or "", None)
        elif isinstance(value, list) and rule.how == "unordered":
            result[rule.field or ""] = sorted(value, key=lambda item: json.dumps(item, sort_keys=True))
        elif isinstance(value, list) and rule.how == "total":
            result[rule.field or ""] = round(sum(value), 2)
    return result


def _first_difference(mine: Record | None, theirs: Record | None) -> str:
    if mine is None or theirs is None:
        return "is missing" if mine is None else "should not exist"
    name = next(name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name))
    return f"{name} is {short(mine.get(name))}, expected {short(theirs.get(name))}"


def _holds(domain: Domain, db: Database, predicate: str, arguments: dict[str, Any], equals: Any) -> bool:
    """Whether a condition holds; one that cannot be computed does not."""
    function = domain.predicate.get(predicate)
    try:
        return function is not None and bool(function(db, **arguments) == equals)
    except Exception:
        return False


def _run_function(source: str | None, db: Database, said: Sequence[str], sandbox: Sandbox | None) -> str | None:
    if source is None:
        return None
    if sandbox is None:
        raise ValueError("the checker has a function, which runs in a sandbox; there is none")
    answer = sandbox.call(source, "check", {"state": db.changes(), "said": list(said)})
    return None if answer in ("True", "true") else short(answer)


def _arguments(arguments: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
