"""A task of a domain as data: initial state, user, gold calls, and checker."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pact_fast.errors import DataError

Party = Literal["agent", "user"]


@dataclass(frozen=True)
class Edit:
    """A change of the database before the episode begins: one field of one record."""

    table: str
    key: str
    field: str
    value: Any


@dataclass(frozen=True)
class Step:
    """One gold call. `by`: who makes it; the user's tools are the user's alone."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    by: Party = "agent"


@dataclass(frozen=True)
class Assertion:
    """A condition on the final state: `predicate` of the domain, called with `arguments`, returns `equals`."""

    predicate: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    equals: Any = True


@dataclass(frozen=True)
class Rule:
    """Difference that is ignored when two states are compared.

    how    ignore: the table, or its field, does not count; unordered: lists in the field are compared as sets with
           multiplicity; total: lists of numbers in the field are compared by their sum
    table  the table
    field  its field; None (for ignore): the whole table
    """

    how: Literal["ignore", "unordered", "total"]
    table: str
    field: str | None = None


@dataclass(frozen=True)
class Checker:
    """Conditions that a solution must meet, as data; `checker.judge` evaluates them.

    compare     the final state must equal the state after the gold calls, up to `normalise`
    assertions  conditions on the final state
    say         texts that the agent must have told the user
    normalise   differences that the comparison ignores
    function    Python source of `check(state, said) -> bool`, run in the sandbox; None: there is none
    """

    compare: bool = True
    assertions: tuple[Assertion, ...] = ()
    say: tuple[str, ...] = ()
    normalise: tuple[Rule, ...] = ()
    function: str | None = None


@dataclass(frozen=True)
class User:
    """The user of an episode.

    opening   first message
    knows     facts that the user tells when asked, by name ("phone number")
    goal      said again where the user did not understand
    device    key of the record that the user's tools act on; None: the user has no tools
    patience  messages in a row that the user may fail to understand
    secrets   values that the agent has to find; the user never says them
    """

    opening: str
    knows: Mapping[str, str] = field(default_factory=dict)
    goal: str = ""
    device: str | None = None
    patience: int = 3
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instance:
    """One task.

    id        unique; has no meaning
    domain    name of the domain
    subject   the entity that the task is about (a customer), which decides the split
    issues    names of the issues that were composed
    init      changes of the database before the episode
    user      the user
    gold      calls that solve the task, reads included
    checker   conditions that a solution must meet
    versions  stage → version of the prompts and workflow that made the instance
    """

    id: str
    domain: str
    subject: str
    issues: tuple[str, ...]
    init: tuple[Edit, ...]
    user: User
    gold: tuple[Step, ...]
    checker: Checker
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything but id and versions: equal for equal tasks."""
        body = {key: value for key, value in self.to_json().items() if key not in ("id", "versions")}
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Instance:
        """DataError that names the field if the data are not an instance."""
        try:
            checker = dict(value["checker"])
            return cls(
                id=str(value["id"]),
                domain=str(value["domain"]),
                subject=str(value["subject"]),
                issues=tuple(value["issues"]),
                init=tuple(Edit(**edit) for edit in value["init"]),
                user=User(**{**value["user"], "secrets": tuple(value["user"].get("secrets") or ())}),
                gold=tuple(Step(**step) for step in value["gold"]),
                checker=Checker(
                    compare=bool(checker.pop("compare")),
                    assertions=tuple(Assertion(**item) for item in checker.pop("assertions")),
                    say=tuple(checker.pop("say")),
                    normalise=tuple(Rule(**item) for item in checker.pop("normalise")),
                    **checker,
                ),
                versions=dict(value.get("versions") or {}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"no instance of a domain: {type(error).__name__}: {error}; write it with Instance.to_json",
                field="env_args",
            ) from None
