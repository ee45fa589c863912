"""The pipeline of one attempt: the stages of the workflow in their order, and a gate that no workflow can leave out."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from pact_fast.envs.domain import Domain
from pact_fast.envs.domain.controls import Finding
from pact_fast.synthesis.eigendata.assess import RulesTrajectoryVerifier
from pact_fast.synthesis.eigendata.compose import RulesSynthesizer, RulesTaskVerifier, seed_of
from pact_fast.synthesis.eigendata.planner import RulesPlanner
from pact_fast.synthesis.eigendata.reflect import RulesReflector
from pact_fast.synthesis.eigendata.roles import (
    Candidate,
    Planner,
    Player,
    Reflector,
    Rollout,
    Synthesizer,
    TaskPlan,
    TaskVerifier,
    TrajectoryVerifier,
)
from pact_fast.synthesis.eigendata.rollout import ScriptedPlayer
from pact_fast.synthesis.eigendata.versions import Version


@dataclass
class Roles:
    """Implementation of each role; by default the rules."""

    planner: Planner = field(default_factory=RulesPlanner)
    synthesizer: Synthesizer = field(default_factory=RulesSynthesizer)
    task_verifier: TaskVerifier = field(default_factory=RulesTaskVerifier)
    player: Player = field(default_factory=ScriptedPlayer)
    trajectory_verifier: TrajectoryVerifier = field(default_factory=RulesTrajectoryVerifier)
    reflector: Reflector = field(default_factory=RulesReflector)


class Pipeline:
    """Makes and judges candidates of one domain.

    Args:
        domain: The domain.
        roles: Who plays each role.
        seed: Seed of all random numbers. A candidate is a function of seed, version and its position alone, so that several
            can be made at the same time.
    """

    def __init__(self, domain: Domain, roles: Roles, seed: int):
        self.domain, self.roles, self.seed = domain, roles, seed
        self._subjects = domain.subjects()

    def plans(self, version: Version, count: int) -> list[TaskPlan]:
        """Up to `count` plans of a version; fewer if the planner has no more."""
        made: list[TaskPlan] = []
        while len(made) < count:
            rng = random.Random(seed_of(self.seed, "plan", len(made)))
            plan = self.roles.planner.plan(self.domain, made, version, rng)
            if plan is None:
                break
            made.append(plan)
        return made

    def attempt(self, candidate: Candidate, plan: TaskPlan, version: Version, purpose: str = "slot") -> int:
        """Run the stages on a candidate and fill it in; `accepted` is left to the caller.

        Args:
            candidate: The candidate; its position seeds its random numbers.
            plan: The plan of its slot.
            version: Prompts and workflow.
            purpose: Candidates of another purpose draw other random numbers.

        Returns:
            Number of dialogues that were played.
        """
        key = (self.seed, purpose, candidate.slot, candidate.attempt)
        rng = random.Random(seed_of(*key))
        subject = rng.choice(self._subjects) if self._subjects else ""
        rollouts: list[Rollout] = []
        verified = False
        for stage in version.settings("workflow.yaml")["stages"]:
            candidate.stage = stage
            if stage == "synthesis":
                made = self.roles.synthesizer.synthesize(self.domain, plan, subject, version, rng)
                if made is None:
                    candidate.findings = [Finding("synthesis", "task", "the plan does not fit the subject")]
                    return 0
                candidate.instance = replace(
                    made, versions={**made.versions, "plan": f"{version.number}/{plan.number}"}
                )
            elif stage == "verification":
                candidate.findings = self._verify(candidate, plan, version)
                verified = not plan.controls
            elif stage == "rollout":
                rollouts = self._play(candidate, version, rng)
            elif stage == "assessment":
                self._assess(candidate, rollouts, version)
            if candidate.findings:
                return len(rollouts)
        if not verified:  # no workflow can accept a task whose controls do not hold
            candidate.findings = self._verify(candidate, replace(plan, controls=()), version)
            candidate.stage = "verification" if candidate.findings else candidate.stage
        return len(rollouts)

    def _verify(self, candidate: Candidate, plan: TaskPlan, version: Version) -> list[Finding]:
        assert candidate.instance
        return self.roles.task_verifier.verify(self.domain, plan, candidate.instance, version)

    def _play(self, candidate: Candidate, version: Version, rng: random.Random) -> list[Rollout]:
        assert candidate.instance
        count = version.settings("workflow.yaml")["rollouts"]
        played = [self.roles.player.play(self.domain, candidate.instance, version, rng) for _ in range(count)]
        candidate.rollout = next((rollout for rollout in played if rollout.passed), played[0] if played else None)
        return played

    def _assess(self, candidate: Candidate, rollouts: list[Rollout], version: Version) -> None:
        assert candidate.instance
        verifier = self.roles.trajectory_verifier
        assessment = verifier.assess(self.domain, candidate.instance, rollouts, version)
        candidate.score = assessment.score
        if assessment.score < version.settings("workflow.yaml")["min_score"]:
            candidate.findings = list(assessment.findings)
