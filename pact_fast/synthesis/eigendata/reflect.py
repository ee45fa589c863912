"""Rules: reflection by attribution. Each control names the settings that can make it fail, and the next value is tried.

Nothing here knows which value is right: the engine measures every proposal on a fixed set of probes and keeps the
improvements. Thresholds are never lowered, and controls never left out: more acceptance must not come from worse tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pact_fast.synthesis.eigendata.roles import Candidate, Revision
from pact_fast.synthesis.eigendata.versions import CHOICES, Version

# control → settings that can make it fail, the likeliest first
SUSPECTS: dict[str, tuple[tuple[str, str], ...]] = {
    "gold_runs": (("synthesis.yaml", "combine"), ("synthesis.yaml", "last_steps")),
    "repeats": (("synthesis.yaml", "combine"),),
    "gold_passes": (("synthesis.yaml", "last_steps"), ("synthesis.yaml", "combine")),
    "findable": (("synthesis.yaml", "last_steps"), ("synthesis.yaml", "user_tells")),
    "keeps_secrets": (("synthesis.yaml", "user_tells"), ("user.yaml", "greeting")),
    "nothing_fails": (
        ("synthesis.yaml", "must_say"), ("synthesis.yaml", "compare_state"), ("synthesis.yaml", "assertions"),
    ),
    "goal_stated": (("synthesis.yaml", "assertions"),),
    "silence_fails": (("synthesis.yaml", "must_say"),),
    "omissions_fail": (
        ("synthesis.yaml", "last_steps"), ("synthesis.yaml", "compare_state"), ("synthesis.yaml", "assertions"),
    ),
    "prefixes_fail": (("synthesis.yaml", "compare_state"), ("synthesis.yaml", "assertions")),
    "orders_pass": (("synthesis.yaml", "normalise"), ("synthesis.yaml", "compare_state")),
    "message_limit": (("workflow.yaml", "max_messages"),),
    "user_gave_up": (("user.yaml", "patience"),),
    "user_did_not_act": (("user.yaml", "patience"), ("user.yaml", "greeting")),
    "rollout_failed": (("workflow.yaml", "max_messages"), ("workflow.yaml", "rollouts")),
    "duplicate": (("workflow.yaml", "retries"),),
}  # fmt: skip


class RulesReflector:
    """Proposes the next untried value of each suspect, for the most frequent failures first."""

    def reflect(
        self, version: Version, candidates: Sequence[Candidate], rejected: Sequence[Revision]
    ) -> list[Revision]:
        proposals = list(_workflow(version, candidates))
        tally = Counter(control for candidate in candidates for control in {f.control for f in candidate.findings})
        for control, count in sorted(tally.items(), key=lambda item: (-item[1], item[0])):
            for file, key in SUSPECTS.get(control, ()):
                for value in _next_values(version, file, key):
                    proposals.append(Revision({file: {key: value}}, f"{count} × {control}", control))
        tried = [revision.changes for revision in rejected]
        fresh: list[Revision] = []
        for proposal in proposals:
            if proposal.changes not in tried and proposal.changes not in [other.changes for other in fresh]:
                fresh.append(proposal)
        return fresh


def _workflow(version: Version, candidates: Sequence[Candidate]) -> Iterator[Revision]:
    """Changes of the stages themselves: verify before playing, and do not leave a stage out."""
    stages = list(version.settings("workflow.yaml")["stages"])
    complete = ["synthesis", "verification", "rollout", "assessment"]
    if stages != complete:
        missing = [stage for stage in complete if stage not in stages]
        reason = f"the workflow lacks {', '.join(missing)}" if missing else "tasks are played before they are verified"
        yield Revision({"workflow.yaml": {"stages": complete}}, reason)


def _next_values(version: Version, file: str, key: str) -> list[Any]:
    """Other values of a setting: all choices, or for a number its multiples."""
    value, choices = version.settings(file)[key], CHOICES[file][key]
    if not any(isinstance(choice, type) for choice in choices):
        return [choice for choice in choices if choice != value]
    return [max(1, value) * factor for factor in (2, 4, 8)] if isinstance(value, int) else []
