"""A language model as verifier of tasks and of dialogues: a second opinion after the rules.

Controls are always executed, and scores are the checker's. A model can make fewer tasks accepted, never worse ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pact_fast.envs.domain import Checker, Domain, Instance, Step
from pact_fast.envs.domain.controls import Finding
from pact_fast.llm import InvalidAnswer, LLMClient
from pact_fast.synthesis.eigendata.assess import RulesTrajectoryVerifier
from pact_fast.synthesis.eigendata.compose import RulesTaskVerifier
from pact_fast.synthesis.eigendata.roles import Assessment, Rollout, TaskPlan, TaskVerifier, TrajectoryVerifier
from pact_fast.synthesis.eigendata.versions import Version

BLAMES = ("task", "checker", "user", "policy")
JUDGED = "judged"  # control of a finding that is a model's opinion


class ModelTaskVerifier:
    """Controls first, and a model's objection after them: it can reject a task, and accepts none.

    Args:
        client: The model.
        rules: Executes the controls.
    """

    def __init__(self, client: LLMClient, rules: TaskVerifier | None = None):
        self._client, self._rules = client.with_role("verifier"), rules or RulesTaskVerifier()

    def verify(self, domain: Domain, plan: TaskPlan, instance: Instance, version: Version) -> list[Finding]:
        """Findings of the controls; without any, the model's. An answer that cannot be used is no objection."""
        findings = self._rules.verify(domain, plan, instance, version)
        if findings:
            return findings
        prompt = version.prompt(
            "verification.md",
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
        prompt = version.prompt(
            "attribution.md", opening=instance.user.opening, calls=_calls(instance.gold), reason=failed.reason,
            dialogue=dialogue,
        )  # fmt: skip
        try:
            answer = self._client.complete([{"role": "user", "content": prompt}], schema=BLAME, repairs=1)
        except InvalidAnswer:
            return found
        return Assessment(
            found.score, (Finding(JUDGED, answer.value["blame"], answer.value["reason"]), *found.findings)
        )


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
