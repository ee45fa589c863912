"""Rules: composes a task of a domain's issues, and verifies it by its controls."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from pact_fast.envs.domain import Checker, Database, Domain, Instance, IssueDraft, Step, User
from pact_fast.envs.domain.checker import Sandbox
from pact_fast.envs.domain.controls import Finding, check_instance
from pact_fast.synthesis.eigendata.roles import TaskPlan
from pact_fast.synthesis.eigendata.versions import CHOICES, Version

OPENINGS = {
    "plain": ("Hello.", ""),
    "polite": ("Good day, I hope that you can help me.", "Thank you very much."),
    "hurried": ("Hi, I have little time.", "Please be quick."),
    "worried": ("Hello, I am really worried.", "I hope that it can be mended."),
}


class RulesSynthesizer:
    """Composes a task from its issues' drafts: edits, fixes, assertions, and the user's words."""

    def synthesize(
        self, domain: Domain, plan: TaskPlan, subject: str, version: Version, rng: random.Random
    ) -> Instance | None:
        settings, db = version.settings("synthesis.yaml"), Database(domain.base)
        drafts = [issue.draw(db, subject, rng) for issue in domain.issues if issue.name in plan.issues]
        if any(draft is None for draft in drafts):
            return None
        found = [draft for draft in drafts if draft is not None]
        rng.shuffle(found)
        begin = domain.introduction(db, subject, rng)
        secrets = dict.fromkeys([*begin.secrets, *(secret for draft in found for secret in draft.secrets)])
        assertions = [item for draft in found for item in draft.assertions] if settings["assertions"] else []
        say = dict.fromkeys(text for draft in found for text in draft.say) if settings["must_say"] else {}
        instance = Instance(
            id="",
            domain=domain.name,
            subject=subject,
            issues=tuple(plan.issues),
            init=(*begin.init, *(edit for draft in found for edit in draft.init)),
            user=User(
                opening=_opening(found, plan, version, rng, tuple(secrets)),
                knows={**begin.knows, **{k: v for draft in found for k, v in draft.knows.items()}},
                goal=" ".join(draft.complaint for draft in found),
                device=begin.device,
                patience=version.settings("user.yaml")["patience"],
                secrets=tuple(secrets),
            ),
            gold=(*begin.first, *_gold(found, settings["last_steps"])),
            checker=Checker(
                compare=settings["compare_state"],
                assertions=tuple(assertions),
                say=tuple(say),
                normalise=tuple(domain.bookkeeping) if settings["normalise"] == "bookkeeping" else (),
            ),
            versions={name: version.label(name) for name in CHOICES},
        )
        return with_id(instance)


class RulesTaskVerifier:
    """The controls that the plan names; no opinion beyond them."""

    def __init__(self, sandbox: Sandbox | None = None):
        self._sandbox = sandbox

    def verify(self, domain: Domain, plan: TaskPlan, instance: Instance, version: Version) -> list[Finding]:
        return check_instance(domain, instance, plan.controls or None, self._sandbox)


def with_id(instance: Instance) -> Instance:
    """Return the instance with an id derived from its content."""
    return replace(instance, id=f"{instance.domain}-{instance.digest[:16]}")


def _gold(drafts: Sequence[IssueDraft], last_steps: str) -> list[Step]:
    """The fixes in order, then the common final steps; equal steps occur once."""
    steps: list[Step] = []
    for draft in drafts:
        steps += draft.fix
        steps += draft.last if last_steps == "each" else ()
    if last_steps == "once":
        for step in (step for draft in drafts for step in draft.last):
            if step not in steps:
                steps.append(step)
    return steps


def _opening(
    drafts: Sequence[IssueDraft], plan: TaskPlan, version: Version, rng: random.Random, secrets: Sequence[str]
) -> str:
    hello, end = OPENINGS[plan.style] if version.settings("user.yaml")["greeting"] == "short" else ("", "")
    joins = rng.choice((" Also: ", " And another thing: ", " Besides, ", " "))
    wishes = joins.join(draft.complaint for draft in drafts)
    tells = version.settings("synthesis.yaml")["user_tells"] == "everything" and secrets
    told = f"For your files: {', '.join(secrets)}." if tells else ""
    return " ".join(part for part in (hello, wishes, told, end) if part)


def seed_of(*parts: object) -> int:
    """Return a seed derived from the text of any value, equal in all processes."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")
