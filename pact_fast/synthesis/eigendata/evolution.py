"""Evolution of prompts and workflow: every proposal of the reflector is measured on fixed probes, and kept or rolled back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pact_fast.errors import PactError
from pact_fast.synthesis.eigendata.pipeline import Pipeline
from pact_fast.synthesis.eigendata.roles import Candidate, Revision
from pact_fast.synthesis.eigendata.versions import Version

PROBES = 48
PROPOSALS = 24  # measured in one round at most


@dataclass(frozen=True)
class Probe:
    """Results of a version on the probes.

    accepted  tasks without findings under all controls, independent of the workflow
    total     probes
    controls  probes with a finding of a control, by control
    rollouts  dialogues that were played
    """

    accepted: int
    total: int
    controls: Counter[str]
    rollouts: int

    @property
    def acceptance(self) -> float:
        return self.accepted / max(self.total, 1)

    def better_than(self, other: Probe, target: str) -> bool:
        """More accepted; or as many, and fewer findings, of the target, too; or fewer dialogues for nothing.

        Several faults hide each other: fixing one may not yet increase acceptance.
        """
        if self.accepted != other.accepted:
            return self.accepted > other.accepted
        if target:
            fewer = self.controls.total() < other.controls.total()
            return fewer and self.controls[target] < other.controls[target]
        return self.rollouts < other.rollouts and self.controls.total() <= other.controls.total()


@dataclass(frozen=True)
class Trial:
    """A proposal that was measured. `number`: of its version; `parent`: of the version that it changes."""

    number: int
    parent: int
    revision: Revision
    before: float
    after: float
    adopted: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.number,
            "parent": self.parent,
            "changes": self.revision.changes,
            "reason": self.revision.reason,
            "probe_before": round(self.before, 4),
            "probe_after": round(self.after, 4),
            "adopted": self.adopted,
        }


def probe(pipeline: Pipeline, version: Version, plans: int, count: int = PROBES) -> Probe:
    """Measure a version: the same probes for every version, one attempt each.

    Args:
        pipeline: Makes the tasks.
        version: The version to measure.
        plans: Plans to ask for.
        count: Probes.
    """
    made = pipeline.plans(version, plans)
    if not made:
        return Probe(0, count, Counter(), 0)
    controls: Counter[str] = Counter()
    rollouts = accepted = 0
    for slot in range(count):
        candidate = Candidate(0, slot % len(made), slot, 0, version.number)
        rollouts += pipeline.attempt(candidate, made[slot % len(made)], version, purpose="probe")
        accepted += not candidate.findings
        controls.update({finding.control for finding in candidate.findings})
    return Probe(accepted, count, controls, rollouts)


def weaker(proposed: Version, version: Version) -> bool:
    """Whether a version accepts tasks that are worse: a lower score, or closer to others."""
    new, old = proposed.settings("workflow.yaml"), version.settings("workflow.yaml")
    return new["min_score"] < old["min_score"] or new["max_similarity"] > old["max_similarity"]


def evolve(
    pipeline: Pipeline,
    version: Version,
    candidates: Sequence[Candidate],
    rejected: list[Revision],
    *,
    plans: int,
    next_number: int,
    save: Callable[[Version], None],
) -> tuple[Version, list[Trial]]:
    """The version after a round of reflection, and all proposals that were measured.

    Args:
        pipeline: Makes the probes.
        version: The version of the round.
        candidates: What it made.
        rejected: Proposals that were rolled back since a version was adopted; gets those of this round.
        plans: Number of plans.
        next_number: Number of the next version.
        save: Keeps every version that is measured.
    """
    trials: list[Trial] = []
    measured: Probe | None = None
    for revision in pipeline.roles.reflector.reflect(version, candidates, rejected)[:PROPOSALS]:
        if measured is not None and revision.target and not measured.controls[revision.target]:
            continue  # answered by a proposal before it
        measured = measured or probe(pipeline, version, plans)
        try:
            proposed = version.changed(next_number, revision.changes)
        except PactError:
            rejected.append(revision)  # a setting or a value that does not exist
            continue
        if weaker(proposed, version):
            rejected.append(revision)
            continue
        save(proposed)
        next_number += 1
        result = probe(pipeline, proposed, plans)
        adopted = result.better_than(measured, revision.target)
        trials.append(Trial(proposed.number, version.number, revision, measured.acceptance, result.acceptance, adopted))
        if adopted:
            version, measured = proposed, result
            rejected.clear()  # proposals that did not help before may help now
        else:
            rejected.append(revision)
    return version, trials
