"""Export of the engine's tasks as training data, with dialogues as expert traces and statistics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pact_fast.data.readers import write_tasks
from pact_fast.data.types import Task
from pact_fast.envs.domain import Instance
from pact_fast.envs.domain.env import instance_task
from pact_fast.envs.registry import environment
from pact_fast.files import write_text
from pact_fast.synthesis.eigendata.engine import DataEngine
from pact_fast.synthesis.eigendata.quality import Leakage, coverage, diversity, leakage, pass_rates, split_of
from pact_fast.synthesis.eigendata.roles import Candidate
from pact_fast.synthesis.eigendata.versions import CURE, Version


@dataclass
class DataSet:
    """Accepted tasks and their statistics.

    candidates  all attempts
    accepted    those that are part of the data
    rates       task id → reference policy → pass rate
    summary     numbers for summary.json
    """

    candidates: list[Candidate]
    accepted: list[Candidate]
    rates: dict[str, dict[str, float]]
    summary: dict[str, Any]


def export(engine: DataEngine, candidates: list[Candidate], phase: Callable[[str, int], Any]) -> DataSet:
    """Write train.jsonl, held_out.jsonl and summary.json of a finished engine."""
    domain, accepted = engine.domain, [candidate for candidate in candidates if candidate.accepted]
    version = Version.load(engine.out / "versions", engine.rounds[-1]["version"])
    rates: dict[str, dict[str, float]] = {}
    with phase("difficulty", len(accepted)) as advance:
        for candidate in accepted:
            rates[_instance(candidate).id] = pass_rates(domain, _instance(candidate), version)
            advance("")
    splits: dict[str, list[Candidate]] = {"train": [], "held_out": []}
    for candidate in accepted:
        splits[split_of(_instance(candidate).subject)].append(candidate)
    leaked = leakage(domain, *([_instance(c) for c in splits[split]] for split in ("train", "held_out")))
    for split, members in splits.items():
        write_tasks(engine.out / f"{split}.jsonl", [_task(engine, c, rates) for c in members])
    summary = summarise(engine, candidates, accepted, splits, leaked, rates)
    write_text(engine.out / "summary.json", json.dumps(summary, indent=2) + "\n", CURE)
    return DataSet(candidates, accepted, rates, summary)


def summarise(
    engine: DataEngine,
    candidates: Sequence[Candidate],
    accepted: Sequence[Candidate],
    splits: dict[str, list[Candidate]],
    leaked: Leakage,
    rates: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """The numbers of summary.json.

    Args:
        engine: The engine that ran.
        candidates: All attempts.
        accepted: The candidates that are rows.
        splits: {split: its candidates}.
        leaked: Overlap of the splits.
        rates: {id of a task: {reference policy: pass rate}}.
    """
    instances = [_instance(candidate) for candidate in accepted]
    blame = Counter((f.control, f.blame) for c in candidates if c.findings for f in c.findings[:1])
    policies = list(next(iter(rates.values()), {}))
    return {
        **asdict(engine.settings),
        "attempts": len(candidates),
        "accepted": len(accepted),
        "train": len(splits["train"]),
        "held_out": len(splits["held_out"]),
        "rounds_made": engine.rounds,
        "attribution": [{"control": c, "blame": b, "count": n} for (c, b), n in sorted(blame.items())],
        "diversity": asdict(diversity(instances)),
        "coverage": coverage(engine.domain, instances),
        "leakage": asdict(leaked),
        "pass_rates": {name: sum(rate[name] for rate in rates.values()) / len(rates) for name in policies},
    }


def _task(engine: DataEngine, candidate: Candidate, rates: dict[str, dict[str, float]]) -> Task:
    instance = _instance(candidate)
    own = engine.domain.name in environment.names()  # an environment of its own plays it without arguments
    dialogue = candidate.rollout.messages if candidate.rollout and candidate.rollout.passed else None
    task = instance_task(engine.domain, instance, engine.domain.name if own else "domain", dialogue)
    return replace(task, columns={"pass_rates": rates[instance.id], "issues": list(instance.issues)})


def _instance(candidate: Candidate) -> Instance:
    assert candidate.instance
    return candidate.instance
