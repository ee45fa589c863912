"""Rules: scores the dialogues of a task. Its controls hold already, so failures are the user's or the policy's."""

from __future__ import annotations

from collections.abc import Sequence

from pact_fast.envs.domain import Domain, Instance
from pact_fast.envs.domain.controls import Finding
from pact_fast.synthesis.eigendata.roles import Assessment, Rollout
from pact_fast.synthesis.eigendata.versions import Version


class RulesTrajectoryVerifier:
    """The score is the fraction of dialogues that pass. The cause to blame follows from the user's actions."""

    def assess(self, domain: Domain, instance: Instance, rollouts: Sequence[Rollout], version: Version) -> Assessment:
        score = sum(rollout.passed for rollout in rollouts) / max(len(rollouts), 1)
        findings = [finding for rollout in rollouts if (finding := blame(rollout))]
        if score < version.settings("workflow.yaml")["min_score"] and not findings:
            findings = [Finding("min_score", "policy", f"the score is {score:.2f}")]
        return Assessment(score, tuple(findings))


def blame(rollout: Rollout) -> Finding | None:
    """Why a dialogue failed; None if it passed."""
    if rollout.passed:
        return None
    if not rollout.over:
        return Finding("message_limit", "policy", rollout.reason)
    if rollout.gave_up:
        return Finding("user_gave_up", "user", "the user did not understand and left")
    if rollout.missed:
        return Finding("user_did_not_act", "user", f"the user did not do {', '.join(rollout.missed)}")
    return Finding("rollout_failed", "policy", rollout.reason)
