"""A language model as planner: it chooses issues and style; the rules choose everything else of a plan."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pact_fast.envs.domain import Domain
from pact_fast.llm import InvalidAnswer, LLMClient
from pact_fast.synthesis.eigendata.planner import STYLES, RulesPlanner
from pact_fast.synthesis.eigendata.roles import Planner, TaskPlan
from pact_fast.synthesis.eigendata.versions import Version


class ModelPlanner:
    """Lets a model choose the issues and the style of each plan; an overlap with another plan is sent back.

    Args:
        client: The model.
        rules: Plans where the model's answer cannot be used, repairs included.
    """

    def __init__(self, client: LLMClient, rules: Planner | None = None):
        self._client, self._rules = client.with_role("planner"), rules or RulesPlanner()

    def plan(
        self, domain: Domain, existing: Sequence[TaskPlan], version: Version, rng: random.Random
    ) -> TaskPlan | None:
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

        prompt = version.prompt(
            "planning.md",
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


def _plan_schema(issues: list[str], most: int) -> dict[str, Any]:
    chosen = {"type": "array", "items": {"enum": issues}, "minItems": 1, "maxItems": most}
    properties = {"issues": chosen, "style": {"enum": list(STYLES)}}
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
