"""The engine: rounds of plan → synthesis → verification → rollout → assessment, and reflection after each.

A folder holds everything, and a command that was killed continues from it:

    settings.json      settings of the run
    versions/0001/     prompts and workflow, one folder per version
    plans/0001.jsonl   the plans of a version
    candidates.jsonl   all attempts, with findings and dialogues
    rounds.jsonl       one line per finished round, with the proposals that were measured
    train.jsonl, held_out.jsonl, summary.json, report.html
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pact_fast.envs.domain import Domain
from pact_fast.envs.domain.controls import Finding
from pact_fast.errors import PactError
from pact_fast.files import io_errors, write_text
from pact_fast.synthesis.eigendata.evolution import Trial, evolve
from pact_fast.synthesis.eigendata.pipeline import Pipeline, Roles
from pact_fast.synthesis.eigendata.quality import Similarity
from pact_fast.synthesis.eigendata.records import CandidateLog
from pact_fast.synthesis.eigendata.roles import Candidate, Revision, TaskPlan
from pact_fast.synthesis.eigendata.versions import CURE, START, Version
from pact_fast.synthesis.ordered import ordered

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Settings of a synthesis run.

    domain  name, or file.py:Class
    seed    of all random numbers
    rounds  rounds of synthesis; reflection comes after each but the last
    plans   pairs of synthesis and evaluation plan
    count   tasks to make in all rounds; a few less are accepted
    models  roles that a language model plays (`make_roles.ROLES`)
    """

    domain: str
    seed: int = 0
    rounds: int = 3
    plans: int = 64
    count: int = 600
    models: tuple[str, ...] = ()

    @property
    def slots_per_round(self) -> int:
        return math.ceil(self.count / self.rounds)


class DataEngine:
    """Makes the tasks of a domain in a folder.

        DataEngine(make_domain("helpdesk"), Path("out"), Settings("helpdesk")).run()

    Args:
        domain: The domain.
        out: The folder; one with the same settings is continued.
        settings: What to make.
        roles: Who plays each role; None: the rules.
        start: Folder of the first version's files; None: the shipped ones.
        workers: Tasks at the same time, for models that answer several questions at a time. It changes no result.

    Raises:
        PactError: The folder holds the work of other settings, or another process works in it.
    """

    def __init__(
        self,
        domain: Domain,
        out: Path,
        settings: Settings,
        roles: Roles | None = None,
        start: Path | None = None,
        workers: int = 1,
    ):
        if min(settings.rounds, settings.plans, settings.count) < 1:
            raise PactError("rounds, plans and count must be at least 1")
        if roles is None and not domain.issues:
            raise PactError(
                f"the domain {domain.name} has no issues from which the rules compose tasks; give it some "
                "(docs/eigendata.md), or another synthesizer"
            )
        self.domain, self.out, self.settings = domain, out, settings
        self.pipeline = Pipeline(domain, roles or Roles(), settings.seed)
        self._start, self._workers = start or START, workers
        self.rejected: list[Revision] = []
        self.trials: list[Trial] = []
        self.rounds: list[dict[str, Any]] = []

    def run(self, phase: Callable[[str, int], Any] | None = None) -> list[Candidate]:
        """Make all rounds that are not there yet. Returns all candidates.

        Args:
            phase: A context manager for progress, as `Progress.phase(name, total)`.
        """
        with io_errors(self.out, CURE):
            self.out.mkdir(parents=True, exist_ok=True)
        with self.locked():
            self._check_settings()
            version = self._resume()
            log = CandidateLog(self.out / "candidates.jsonl")
            try:
                for number in range(len(self.rounds) + 1, self.settings.rounds + 1):
                    version = self._round(number, version, log, phase or silent)
                return log.candidates
            finally:
                log.close()

    def _round(self, number: int, version: Version, log: CandidateLog, phase: Callable[[str, int], Any]) -> Version:
        plans = self.pipeline.plans(version, self.settings.plans)
        if not plans:
            raise PactError(f"the planner has no plan for the domain {self.domain.name}; give it issues")
        self._save_plans(version, plans)
        slots = self.settings.slots_per_round
        done = {candidate.slot for candidate in log.candidates}
        similarity = Similarity(version.settings("workflow.yaml")["max_similarity"])
        for candidate in log.candidates:
            if candidate.accepted and candidate.instance:
                similarity.add(candidate.instance)

        def attempts(slot: int) -> list[Candidate]:
            return [] if slot in done else self._attempts(number, slot, 0, plans, version)

        with phase(f"round {number}", slots) as advance:
            mine = range((number - 1) * slots, number * slots)
            for slot, made in zip(mine, ordered(attempts, mine, self._workers), strict=True):
                if made:
                    log.write(self._without_duplicates(made, number, slot, plans, version, similarity))
                advance(f"{sum(candidate.accepted for candidate in log.candidates)} accepted")
        log.sync()
        of_round = [candidate for candidate in log.candidates if candidate.round == number]
        trials: list[Trial] = []
        after = version
        if number < self.settings.rounds:
            after, trials = self._reflect(version, of_round)
        self._save_round(number, version, after, of_round, trials)
        return after

    def _attempts(self, number: int, slot: int, first: int, plans: list[TaskPlan], version: Version) -> list[Candidate]:
        """Attempts at one task from number `first`: until one has no findings, or the retries are used up."""
        plan = plans[slot % len(plans)]
        made: list[Candidate] = []
        for attempt in range(first, version.settings("workflow.yaml")["retries"] + 1):
            made.append(Candidate(number, plan.number, slot, attempt, version.number))
            self.pipeline.attempt(made[-1], plan, version)
            if made[-1].instance and not made[-1].findings:
                break
        return made

    def _without_duplicates(
        self,
        made: list[Candidate],
        number: int,
        slot: int,
        plans: list[TaskPlan],
        version: Version,
        similarity: Similarity,
    ) -> list[Candidate]:
        """Accept the last attempt, unless a task before it is too similar: then with further attempts."""
        while (last := made[-1]).instance and not last.findings:
            earlier = similarity.duplicate_of(last.instance)
            if earlier is None:
                last.accepted = True
                similarity.add(last.instance)
                break
            last.findings = [Finding("duplicate", "task", f"too similar to {earlier}")]
            made += self._attempts(number, slot, len(made), plans, version)
        return made

    def _reflect(self, version: Version, made: list[Candidate]) -> tuple[Version, list[Trial]]:
        number = max(version.number, *(trial.number for trial in self.trials), 1) + 1
        return evolve(
            self.pipeline,
            version,
            made,
            self.rejected,
            plans=self.settings.plans,
            next_number=number,
            save=lambda proposed: proposed.save(self.out / "versions"),
        )

    # -- the folder --------------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        path = self.out / "settings.json"
        asked = {**asdict(self.settings), "models": list(self.settings.models)}
        if path.exists():
            saved = {"models": [], **_json(path)}
            for key, value in asked.items():
                if saved.get(key) != value:
                    raise PactError(
                        f"{self.out} was started with {key}={saved.get(key)!r}, not {value!r}; name another folder, or "
                        "remove this one"
                    )
            return
        if any(self.out.glob("*.jsonl")):
            raise PactError(f"{self.out} holds files that this command did not write; name another folder")
        Version.read(self._start).save(self.out / "versions")
        write_text(path, json.dumps(asked, indent=2) + "\n", CURE)

    def _resume(self) -> Version:
        """Read the finished rounds, and return the version to continue with."""
        path = self.out / "rounds.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            record = json.loads(line)
            self.rounds.append(record)
            for item in record["trials"]:
                revision = Revision(item["changes"], item["reason"])
                trial = Trial(
                    item["version"],
                    item["parent"],
                    revision,
                    item["probe_before"],
                    item["probe_after"],
                    item["adopted"],
                )
                self.trials.append(trial)
                if trial.adopted:
                    self.rejected.clear()
                else:
                    self.rejected.append(revision)
        number = self.rounds[-1]["next_version"] if self.rounds else 1
        return Version.load(self.out / "versions", number)

    def _save_plans(self, version: Version, plans: list[TaskPlan]) -> None:
        folder = self.out / "plans"
        with io_errors(folder, CURE):
            folder.mkdir(exist_ok=True)
        lines = [json.dumps(asdict(plan)) + "\n" for plan in plans]
        write_text(folder / f"{version.number:04d}.jsonl", "".join(lines), CURE)

    def _save_round(
        self, number: int, version: Version, after: Version, made: list[Candidate], trials: list[Trial]
    ) -> None:
        record = {
            "round": number,
            "version": version.number,
            "next_version": after.number,
            "attempts": len(made),
            "accepted": sum(candidate.accepted for candidate in made),
            "trials": [trial.to_json() for trial in trials],
        }
        self.rounds.append(record)
        self.trials += trials
        text = "".join(json.dumps(item) + "\n" for item in self.rounds)
        write_text(self.out / "rounds.jsonl", text, CURE)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process; the lock ends with the process, however it ends."""
        with io_errors(self.out, CURE):
            file = (self.out / "lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise PactError(f"another process works in {self.out}; wait for it, or name another folder") from None
            yield


@contextmanager
def silent(name: str, total: int) -> Iterator[Advance]:
    """Progress without any output."""
    yield lambda info: None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PactError(f"{path} cannot be read: {error}; remove the folder to start again") from None
