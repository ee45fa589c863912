"""Domain: the class that a user brings to get tasks with checkers, and its registry."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pact_fast.data.types import ToolSchema
from pact_fast.envs.domain.database import Database, Tables
from pact_fast.envs.domain.instance import Assertion, Edit, Rule, Step
from pact_fast.envs.domain.tools import Tool, by_name, schema_of
from pact_fast.errors import PactError
from pact_fast.registry import Registry

Predicate = Callable[..., Any]


@dataclass(frozen=True)
class UserAction:
    """Something that the agent can ask the user to do.

    name       the user's tool
    arguments  its arguments, besides the device
    request    the words of the scripted agent
    asked      regular expression that finds the request in other words
    """

    name: str
    arguments: Mapping[str, Any]
    request: str
    asked: str

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(self.asked, re.IGNORECASE)


@dataclass(frozen=True)
class IssueDraft:
    """An issue of one subject: edits that break something, the calls that fix it, and the conditions that hold then.

    init        changes that break it
    fix         calls that fix it, reads included
    last        calls that come after the fixes of all issues; equal ones are made once
    assertions  conditions that hold when it is fixed
    complaint   the user's words about it
    knows       {name: value} of facts that the user tells when asked
    secrets     values that the user must not say, because the agent has to find them
    say         texts that the agent must tell the user
    """

    init: tuple[Edit, ...]
    fix: tuple[Step, ...]
    last: tuple[Step, ...] = ()
    assertions: tuple[Assertion, ...] = ()
    complaint: str = ""
    knows: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    say: tuple[str, ...] = ()


@dataclass(frozen=True)
class Issue:
    """A kind of problem. Issues of different groups can be combined in one task; two of one group cannot.

    draw  (database, subject, random numbers) → draft, or None if the subject cannot have this issue
    """

    name: str
    group: str
    draw: Callable[[Database, str, random.Random], IssueDraft | None]


class Domain:
    """A world to make tasks in. Subclass it in a file of its own, next to `policy.md`, and give

    name          used in files
    policy        text of the system message
    base          {table: {key: record}}, JSON data that episodes share
    agent_tools   functions whose first parameter is the database
    user_tools    the same for the user; their second parameter is the user's device
    user_actions  actions that the agent can ask the user for
    predicates    conditions on the final state: functions whose first parameter is the database
    bookkeeping   differences that a comparison of final states ignores (logs, counters)
    subjects      entities that a task can be about, for example all customers
    issues        kinds of problems, of which the rules of EigenData compose tasks
    introduction  how a dialogue about a subject begins

    Only policy, base and agent_tools are compulsory; without issues, tasks need a model to be written.
    """

    name = ""
    policy = ""
    base: Tables = {}  # noqa: RUF012
    agent_tools: Sequence[Tool] = ()
    user_tools: Sequence[Tool] = ()
    user_actions: Sequence[UserAction] = ()
    predicates: Sequence[Predicate] = ()
    bookkeeping: Sequence[Rule] = ()
    ends_dialogue: Sequence[str] = ()  # agent tools after which nothing more is said
    issues: Sequence[Issue] = ()

    def __init__(self) -> None:
        if not self.name or not self.policy or not self.base or not self.agent_tools:
            raise PactError(f"the domain {type(self).__name__} needs name, policy, base and agent_tools")
        self.agent, self.user = by_name(self.agent_tools), by_name(self.user_tools)
        self.predicate = by_name(self.predicates)
        known = {issue.name for issue in self.issues}
        if len(known) != len(self.issues):
            raise PactError(f"two issues of the domain {self.name} have the same name; rename one of them")

    @functools.cached_property
    def schemas(self) -> list[ToolSchema]:
        """Schemas of the agent's tools."""
        return [schema_of(tool) for tool in self.agent_tools]

    def subjects(self) -> list[str]:
        """Entities that a task can be about; a task of one never shows another."""
        return []

    def introduction(self, db: Database, subject: str, rng: random.Random) -> Introduction:
        """Return the part that all tasks about `subject` have in common. Free choices are drawn with `rng`."""
        return Introduction()


@dataclass(frozen=True)
class Introduction:
    """Part that all tasks of a subject have in common.

    first    calls with which the agent finds the subject
    knows    {name: value} of facts that the user tells when asked
    device   the device that the user's tools act on
    secrets  values that the user must not say
    init     edits of the initial state
    """

    first: tuple[Step, ...] = ()
    knows: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    secrets: tuple[str, ...] = ()
    init: tuple[Edit, ...] = ()


domain: Registry[type[Domain]] = Registry("domain", "DOMAIN", "pact_fast.envs", base=Domain)


@functools.cache
def make_domain(name: str) -> Domain:
    """The domain of a registered name, or of `file.py:Class`. One instance serves all episodes: it holds no state."""
    return domain.get(name)()
