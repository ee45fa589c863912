"""Interface between the engine and its roles: one Protocol per role, and the records that they exchange.

The rules (planner.py, compose.py, rollout.py, assess.py, reflect.py) need no model. A class of your own implements any of
these and is passed to `DataEngine`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pact_fast.data.types import Message
from pact_fast.envs.domain import Domain, Instance
from pact_fast.envs.domain.controls import Finding
from pact_fast.synthesis.eigendata.versions import Version


@dataclass(frozen=True)
class TaskPlan:
    """A pair of synthesis plan and evaluation plan.

    number    position among the plans, from 0
    issues    which kinds of problems the tasks of the plan combine; no two plans have the same
    style     how the user talks
    controls  controls that a task of the plan must pass; empty: all
    """

    number: int
    issues: tuple[str, ...]
    style: str = "plain"
    controls: tuple[str, ...] = ()


@dataclass
class Rollout:
    """One dialogue about an instance.

    messages  the dialogue, with tool calls and results
    passed    the checker's verdict
    reason    why not
    gave_up   the user left because it did not understand
    over      the user ended the dialogue (not a limit)
    missed    requests to the user that it did not carry out
    """

    messages: list[Message]
    passed: bool
    reason: str = ""
    gave_up: bool = False
    over: bool = True
    missed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Assessment:
    """The verdict on an instance's rollouts: a score in [0, 1], and the failures."""

    score: float
    findings: tuple[Finding, ...] = ()


@dataclass
class Candidate:
    """One attempt at an instance, as it is logged.

    round, plan, slot, attempt  which one
    version                     number of the prompts and workflow that made it
    instance                    the task; None: none could be made
    stage                       the last stage that it reached
    findings                    findings of that stage
    accepted                    whether it is part of the data
    score                       of its rollouts; None: there are none
    rollout                     one of its dialogues
    """

    round: int
    plan: int
    slot: int
    attempt: int
    version: int
    instance: Instance | None = None
    stage: str = ""
    findings: list[Finding] = field(default_factory=list)
    accepted: bool = False
    score: float | None = None
    rollout: Rollout | None = None


@dataclass(frozen=True)
class Revision:
    """A change that a reflector proposes.

    changes  {file: {key: new value}}
    reason   which failures it answers
    target   control whose findings it should reduce; empty: none in particular
    """

    changes: dict[str, dict[str, Any]]
    reason: str
    target: str = ""


class Planner(Protocol):
    """Writes plans one after the other; each sees the existing ones."""

    def plan(
        self, domain: Domain, existing: Sequence[TaskPlan], version: Version, rng: random.Random
    ) -> TaskPlan | None:
        """A plan that overlaps none of the existing ones, or None if there is nothing left to plan."""


class Synthesizer(Protocol):
    """Writes the task of a plan."""

    def synthesize(
        self, domain: Domain, plan: TaskPlan, subject: str, version: Version, rng: random.Random
    ) -> Instance | None:
        """A task about `subject`, or None if the plan does not fit it."""


class TaskVerifier(Protocol):
    """Finds problems of a task before it is played."""

    def verify(self, domain: Domain, plan: TaskPlan, instance: Instance, version: Version) -> list[Finding]:
        """Findings, the most telling first; empty: the task is right."""


class Player(Protocol):
    """Plays a task: agent and user in dialogue."""

    def play(self, domain: Domain, instance: Instance, version: Version, rng: random.Random) -> Rollout:
        """One dialogue to its end."""


class TrajectoryVerifier(Protocol):
    """Scores the dialogues of a task, and says who is to blame for failures."""

    def assess(self, domain: Domain, instance: Instance, rollouts: Sequence[Rollout], version: Version) -> Assessment:
        """Return the score and the failures."""


class Reflector(Protocol):
    """Rewrites prompts and workflow from failures."""

    def reflect(
        self, version: Version, candidates: Sequence[Candidate], rejected: Sequence[Revision]
    ) -> list[Revision]:
        """Proposals, each tried on its own; `rejected`: proposals that were rolled back before."""
