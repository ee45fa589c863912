"""Rules: plans that do not overlap, written one after the other so that rarely used issues come first."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from pact_fast.envs.domain import Domain
from pact_fast.synthesis.eigendata.roles import TaskPlan
from pact_fast.synthesis.eigendata.versions import Version

STYLES = ("plain", "polite", "hurried", "worried")
TRIES = 200  # of drawing a combination that does not exist yet


class RulesPlanner:
    """A plan is a set of issues that no other plan has. Sizes go round; within a size, the least used issues come first."""

    def plan(
        self, domain: Domain, existing: Sequence[TaskPlan], version: Version, rng: random.Random
    ) -> TaskPlan | None:
        taken = {frozenset(plan.issues) for plan in existing}
        used = Counter(issue for plan in existing for issue in plan.issues)
        largest = min(version.settings("workflow.yaml")["max_issues"], len(domain.issues))
        any_group = version.settings("synthesis.yaml")["combine"] == "any"
        for attempt in range(TRIES):
            size = 1 + (len(existing) + attempt) % largest
            chosen = _choose(domain, size, used, any_group, rng)
            if chosen and frozenset(chosen) not in taken:
                return TaskPlan(len(existing), tuple(chosen), STYLES[len(existing) % len(STYLES)])
        return None


def _choose(domain: Domain, size: int, used: Counter[str], any_group: bool, rng: random.Random) -> list[str]:
    """Names of `size` issues, in the order of the domain; empty if there are not so many groups."""
    ranked = sorted(domain.issues, key=lambda issue: used[issue.name] + 4 * rng.random())
    groups: set[str] = set()
    chosen: set[str] = set()
    for issue in ranked:
        if len(chosen) < size and (any_group or issue.group not in groups):
            chosen.add(issue.name)
            groups.add(issue.group)
    return [issue.name for issue in domain.issues if issue.name in chosen] if len(chosen) == size else []
