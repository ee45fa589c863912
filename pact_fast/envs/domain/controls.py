"""Controls of an instance: replays that its checker must pass or reject, and the cause to blame for a wrong verdict.

A task is accepted when all of them hold. No model is asked: every control is a replay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pact_fast.envs.domain.base import Domain
from pact_fast.envs.domain.checker import Replay, Sandbox, Verdict, initial_state, judge, replay, state_difference
from pact_fast.envs.domain.instance import Instance, Step
from pact_fast.text import short

Blame = Literal["task", "checker", "user", "policy"]


@dataclass(frozen=True)
class Finding:
    """A control that does not hold.

    control  its name, see CONTROLS
    blame    whose fault that is
    detail   description of the failure
    """

    control: str
    blame: Blame
    detail: str


def check_instance(
    domain: Domain, instance: Instance, controls: Collection[str] | None = None, sandbox: Sandbox | None = None
) -> list[Finding]:
    """The controls that do not hold, the most telling first; empty for an instance that can be accepted.

    Args:
        domain: The domain of the instance.
        instance: The task.
        controls: Names of the controls to apply; None: all.
        sandbox: Runs the checker's function, if it has one.
    """
    try:
        initial_state(domain, instance)
    except (KeyError, TypeError) as error:
        return [Finding("gold_runs", "task", f"the initial state cannot be made: no {error}")]
    tests = _Controls(domain, instance, sandbox)
    wanted = [control for name, control in CONTROLS.items() if controls is None or name in controls]
    return [finding for control in wanted for finding in control(tests)]


class _Controls:
    """One instance under test; the replays that several controls need are made once."""

    def __init__(self, domain: Domain, instance: Instance, sandbox: Sandbox | None):
        self.domain, self.instance, self.sandbox = domain, instance, sandbox
        self.played = replay(domain, instance, instance.gold, watch=True)
        self.writes = [step for step, changed in zip(instance.gold, self.played.changed, strict=True) if changed]

    def play(self, steps: Sequence[Step]) -> Replay:
        return replay(self.domain, self.instance, steps)

    def verdict(self, played: Replay, *, silent: bool = False) -> Verdict:
        said = () if silent else self.instance.checker.say
        return judge(self.domain, self.instance, played.db, said, gold=self.played.db, sandbox=self.sandbox)

    def same(self, one: Replay, other: Replay) -> bool:
        """Whether two states are equal by the rules of the domain, regardless of the checker's comparison."""
        return state_difference(one.db, other.db, self.domain.bookkeeping) is None

    def must_fail(self, control: str, what: str, played: Replay, *, silent: bool = False) -> Iterator[Finding]:
        if not self.verdict(played, silent=silent).passed:
            return
        # the same state as after the gold calls, where a checker could see nothing
        demands = bool(self.instance.checker.assertions or self.writes)
        blame: Blame = "task" if self.same(played, self.played) and demands else "checker"
        why = ", and the state is right: the task needs less than its gold calls" if blame == "task" else ""
        yield Finding(control, blame, f"{what} passes{why}")

    def gold_runs(self) -> Iterator[Finding]:
        for step, text, carried_out in zip(
            self.instance.gold, self.played.observations, self.played.carried_out, strict=True
        ):
            if not carried_out:
                yield Finding("gold_runs", "task", f"{step.name}: {short(text)}")
                return

    def repeats(self) -> Iterator[Finding]:
        again = self.play(self.instance.gold)
        if again.db.digest() != self.played.db.digest():
            difference = state_difference(again.db, self.played.db, ()) or "a record"
            yield Finding("repeats", "task", f"the same calls twice give different states: {difference}")
        elif again.observations != self.played.observations:
            yield Finding("repeats", "task", "the same calls twice give different observations")

    def gold_passes(self) -> Iterator[Finding]:
        verdict = self.verdict(self.played)
        if not verdict.passed:
            only_function = verdict.function is not None and not (verdict.failed or verdict.difference)
            yield Finding("gold_passes", "checker" if only_function else "task", verdict.reason)

    def findable(self) -> Iterator[Finding]:
        """Every value that the agent must write is told by the user or by an earlier observation."""
        user = self.instance.user
        known = " ".join([user.opening, *user.knows.values()])
        for step, text in zip(self.instance.gold, self.played.observations, strict=True):
            for name, value in step.arguments.items() if step.by == "agent" else ():
                if not isinstance(value, bool) and not _occurs(value, known):
                    yield Finding("findable", "task", f"{step.name}: nothing tells the agent {name}={value!r}")
                    return
            known += f" {text}"

    def keeps_secrets(self) -> Iterator[Finding]:
        """The user's words contain no value to be found, no text to be told, and no name of an agent's tool."""
        user = self.instance.user
        text = " ".join([user.opening, user.goal, *user.knows.values()])
        for secret in (*user.secrets, *self.instance.checker.say, *self.domain.agent):
            if _occurs(secret, text):
                yield Finding("keeps_secrets", "user", f"the user's text contains {short(secret)}")
                return

    def goal_stated(self) -> Iterator[Finding]:
        """The goal is stated independently of the gold calls; otherwise a wrong solution would agree with itself."""
        checker = self.instance.checker
        if not self.writes or not self.domain.predicates or not checker.compare or checker.function:
            return
        alone = replace(self.instance, checker=replace(checker, compare=False))
        if judge(self.domain, alone, self.play(()).db, checker.say).passed:
            detail = "the state is compared with that of the gold calls, and nothing else says that they are right"
            yield Finding("goal_stated", "checker", detail)

    def nothing_fails(self) -> Iterator[Finding]:
        yield from self.must_fail("nothing_fails", "doing nothing", self.play(()), silent=True)

    def silence_fails(self) -> Iterator[Finding]:
        if self.instance.checker.say:
            yield from self.must_fail("silence_fails", "telling the user nothing", self.played, silent=True)

    def omissions_fail(self) -> Iterator[Finding]:
        for index, step in enumerate(self.writes):
            played = self.play([*self.writes[:index], *self.writes[index + 1 :]])
            yield from self.must_fail("omissions_fail", f"leaving out {step.name}", played)

    def prefixes_fail(self) -> Iterator[Finding]:
        for count in range(len(self.writes)):
            played = self.play(self.writes[:count])
            yield from self.must_fail("prefixes_fail", f"stopping after {count} of {len(self.writes)} writes", played)

    def orders_pass(self) -> Iterator[Finding]:
        """Another order of writes that the domain says leads to the same state must pass, too."""
        for order in _orders(self.writes):
            played = self.play(order)
            if all(played.carried_out) and self.same(played, self.played):
                verdict = self.verdict(played)
                if not verdict.passed:
                    names = ", ".join(step.name for step in order)
                    yield Finding("orders_pass", "checker", f"the order {names} fails: {verdict.reason}")
                    return


CONTROLS: dict[str, Callable[[_Controls], Iterator[Finding]]] = {
    "gold_runs": _Controls.gold_runs,
    "repeats": _Controls.repeats,
    "gold_passes": _Controls.gold_passes,
    "findable": _Controls.findable,
    "keeps_secrets": _Controls.keeps_secrets,
    "nothing_fails": _Controls.nothing_fails,
    "goal_stated": _Controls.goal_stated,
    "silence_fails": _Controls.silence_fails,
    "omissions_fail": _Controls.omissions_fail,
    "prefixes_fail": _Controls.prefixes_fail,
    "orders_pass": _Controls.orders_pass,
}


def _orders(writes: Sequence[Step]) -> Iterator[list[Step]]:
    """Other orders: every write moved before every earlier one, and all reversed."""
    for later in range(1, len(writes)):
        for earlier in range(later):
            rest = [*writes[:later], *writes[later + 1 :]]
            yield [*rest[:earlier], writes[later], *rest[earlier:]]
    if len(writes) > 2:
        yield list(reversed(writes))


def _occurs(value: Any, text: str) -> bool:
    """Whether the text contains the value as a whole word."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", text, re.IGNORECASE) is not None
