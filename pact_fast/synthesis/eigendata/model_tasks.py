"""Back-ends with a language model for tasks: plans, solutions found with the tools, and a second opinion on both.

What holds a task together stays with the rules: the initial state, the assertions of its issues, and the controls, which are
always executed. A model can make fewer tasks accepted, never worse ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pact_fast.data.types import ToolCall
from pact_fast.envs.domain import Checker, Domain, Instance, Step
from pact_fast.envs.domain.checker import begin, run_step
from pact_fast.envs.domain.controls import Finding
from pact_fast.envs.domain.user_side import user_schemas
from pact_fast.llm import InvalidAnswer, LLMClient
from pact_fast.synthesis.eigendata.actor import Actor
from pact_fast.synthesis.eigendata.assess import RulesTrajectoryVerifier
from pact_fast.synthesis.eigendata.compose import RulesSynthesizer, RulesTaskVerifier, with_id
from pact_fast.synthesis.eigendata.models import prompt_of
from pact_fast.synthesis.eigendata.planner import STYLES, RulesPlanner
from pact_fast.synthesis.eigendata.roles import (
    Assessment,
    Plan,
    Planner,
    Rollout,
    Synthesizer,
    TaskVerifier,
    TrajectoryVerifier,
)
from pact_fast.synthesis.eigendata.versions import Version

MOST_CALLS = 12  # of a solution, those that failed included
BLAMES = ("task", "checker", "user", "policy")
JUDGED = "judged"  # control of a finding that is a model's opinion


class ModelPlanner:
    """Lets a model choose the issues and the style of each plan; what overlaps another plan is sent back.

    Args:
        client: The model.
        rules: Plans where the model's answer cannot be used, repairs included.
    """

    def __init__(self, client: LLMClient, rules: Planner | None = None):
        self._client, self._rules = client.with_role("planner"), rules or RulesPlanner()

    def plan(self, domain: Domain, existing: Sequence[Plan], version: Version, rng: random.Random) -> Plan | None:
        fallback = self._rules.plan(domain, existing, version, rng)
        if fallback is None:
            return None
        most = min(version.settings("workflow.yaml")["max_issues"], len(domain.issues))
        groups = {issue.name: issue.group for issue in domain.issues}
        taken = {frozenset(plan.issues) for plan in existing}
        exclusive = version.settings("synthesis.yaml")["combine"] == "one_per_group"

        def problem(value: dict[str, Any]) -> str | None:
            chosen = value["issues"]
            if len(set(chosen)) != len(chosen):
                return "an issue is there twice"
            if exclusive and len({groups[name] for name in chosen}) != len(chosen):
                return "two issues are of one group"
            return "another plan has these issues" if frozenset(chosen) in taken else None

        prompt = prompt_of(
            version, "planning.md",
            issues="\n".join(f"{name} (group {group})" for name, group in groups.items()),
            existing="\n".join(", ".join(plan.issues) for plan in existing) or "none",
            most=str(most),
        )  # fmt: skip
        try:
            answer = self._client.complete(
                [{"role": "user", "content": prompt}], schema=_plan_schema(list(groups), most), check=problem, repairs=2,
                sample=len(existing),
            )  # fmt: skip
        except InvalidAnswer:
            return fallback
        chosen = set(answer.value["issues"])
        issues = tuple(name for name in groups if name in chosen)
        return replace(fallback, issues=issues, style=answer.value["style"])


class ModelSynthesizer:
    """A synthesizer whose solutions a model finds: it is given the wishes and the tools of both sides, and tries them.

    Calls that were carried out become the gold calls. Initial state and assertions stay those of the composer, so that a
    solution that does not solve the task is rejected by the controls.

    Args:
        client: The model.
        composer: Makes the tasks.
    """

    def __init__(self, client: LLMClient, composer: Synthesizer | None = None):
        self._client, self._composer = client.with_role("synthesizer"), composer or RulesSynthesizer()

    def synthesize(
        self, domain: Domain, plan: Plan, subject: str, version: Version, rng: random.Random
    ) -> Instance | None:
        """None if the composer has no task, or the model makes no call that succeeds."""
        made = self._composer.synthesize(domain, plan, subject, version, rng)
        if made is None:
            return None
        gold = self._solve(domain, made, version, rng.randrange(2**31))
        if not gold:
            return None
        versions = {**made.versions, "solving.md": version.label("solving.md")}
        return with_id(replace(made, gold=tuple(gold), versions=versions))

    def _solve(self, domain: Domain, made: Instance, version: Version, sample: int) -> list[Step]:
        known = "; ".join(f"{name}: {value}" for name, value in made.user.knows.items())
        prompt = prompt_of(version, "solving.md", policy=domain.policy, wishes=made.user.goal, known=known)
        tools = [*domain.schemas, *user_schemas(domain, made)]
        actor = Actor(self._client, prompt, tools, sample=sample, speaks=False)
        actor.hear("Begin.")
        db, gold = begin(domain, made), list[Step]()
        for _ in range(MOST_CALLS):
            call = actor.act()
            if not isinstance(call, ToolCall):
                break
            step = Step(call.name, call.arguments, "agent" if call.name in domain.agent else "user")
            text, carried_out = run_step(domain, made, db, step)
            if carried_out:
                gold.append(step)
            actor.hear(text)
        return gold


class ModelTaskVerifier:
    """Controls first, and a model's objection after them: it can reject a task, and accepts none.

    Args:
        client: The model.
        rules: Executes the controls.
    """

    def __init__(self, client: LLMClient, rules: TaskVerifier | None = None):
        self._client, self._rules = client.with_role("verifier"), rules or RulesTaskVerifier()

    def verify(self, domain: Domain, plan: Plan, instance: Instance, version: Version) -> list[Finding]:
        """Findings of the controls; without any, the model's. An answer that cannot be used is no objection."""
        findings = self._rules.verify(domain, plan, instance, version)
        if findings:
            return findings
        prompt = prompt_of(
            version, "verification.md",
            policy=domain.policy, opening=instance.user.opening, calls=_calls(instance.gold), checker=_shown(instance.checker),
        )  # fmt: skip
        try:
            answer = self._client.complete([{"role": "user", "content": prompt}], schema=VERDICT, repairs=1)
        except InvalidAnswer:
            return []
        value = answer.value
        return [] if value["sound"] else [Finding(JUDGED, value["blame"], value["reason"])]


class ModelTrajectoryVerifier:
    """Scores by the checker; a model says who is to blame where the rules blame the policy for want of evidence.

    Args:
        client: The model.
        rules: Scores, and attributes what the dialogue shows.
    """

    def __init__(self, client: LLMClient, rules: TrajectoryVerifier | None = None):
        self._client, self._rules = client.with_role("verifier"), rules or RulesTrajectoryVerifier()

    def assess(self, domain: Domain, instance: Instance, rollouts: Sequence[Rollout], version: Version) -> Assessment:
        found = self._rules.assess(domain, instance, rollouts, version)
        failed = next((rollout for rollout in rollouts if not rollout.passed), None)
        if failed is None or any(finding.blame != "policy" for finding in found.findings):
            return found
        dialogue = "\n".join(json.dumps(message, ensure_ascii=False) for message in failed.messages[1:])
        prompt = prompt_of(
            version, "attribution.md", opening=instance.user.opening, calls=_calls(instance.gold), reason=failed.reason,
            dialogue=dialogue,
        )  # fmt: skip
        try:
            answer = self._client.complete([{"role": "user", "content": prompt}], schema=BLAME, repairs=1)
        except InvalidAnswer:
            return found
        return Assessment(
            found.score, (Finding(JUDGED, answer.value["blame"], answer.value["reason"]), *found.findings)
        )


def _plan_schema(issues: list[str], most: int) -> dict[str, Any]:
    chosen = {"type": "array", "items": {"enum": issues}, "minItems": 1, "maxItems": most}
    return _object({"issues": chosen, "style": {"enum": list(STYLES)}})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


_REASON = {"type": "string", "minLength": 1, "maxLength": 300}
BLAME = _object({"blame": {"enum": list(BLAMES)}, "reason": _REASON})
VERDICT = _object({"sound": {"type": "boolean"}, "blame": {"enum": ["task", "checker", "user"]}, "reason": _REASON})


def _calls(steps: Sequence[Step]) -> str:
    return "\n".join(
        f"{step.by}: {step.name}({json.dumps(dict(step.arguments), ensure_ascii=False)})" for step in steps
    )


def _shown(checker: Checker) -> str:
    lines = [f"{item.predicate}({dict(item.arguments)}) is {item.equals!r}" for item in checker.assertions]
    return "\n".join([*lines, *(f"the agent tells the user: {text}" for text in checker.say)])
