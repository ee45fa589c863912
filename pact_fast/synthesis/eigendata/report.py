"""The HTML report of a folder that the engine made: one page, no scripts, nothing fetched. All texts are escaped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

import pact_fast.report
from pact_fast.files import write_text
from pact_fast.synthesis.eigendata.engine import DataEngine
from pact_fast.synthesis.eigendata.export import DataSet
from pact_fast.synthesis.eigendata.roles import Candidate
from pact_fast.synthesis.eigendata.versions import CURE, STAGES

DIALOGUES = 24  # of accepted tasks on the page
FAILURES = 24
BINS = 5


def write_report(engine: DataEngine, data: DataSet) -> Path:
    """Write report.html into the engine's folder. Returns its path."""
    folders = [Path(__file__).parent, Path(pact_fast.report.__file__).parent]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = templates.get_template("report.html").render(
        name=engine.out.resolve().name,
        summary=data.summary,
        rounds=[_round(record, data.candidates) for record in engine.rounds],
        stages=STAGES,
        trials=[trial.to_json() for trial in engine.trials],
        coverage=_bars(data.summary["coverage"]),
        difficulty=_difficulty(data.rates),
        dialogues=[_dialogue(c, data.rates) for c in _sample_evenly(data.accepted, DIALOGUES)],
        failures=[_dialogue(c, {}) for c in _sample_evenly([c for c in data.candidates if c.findings], FAILURES)],
    )
    path = engine.out / "report.html"
    write_text(path, page, CURE)
    return path


def _round(record: dict[str, Any], candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Attempts that ended at each stage, of one round."""
    made = [candidate for candidate in candidates if candidate.round == record["round"]]
    lost = Counter("duplicate" if c.findings[0].control == "duplicate" else c.stage for c in made if c.findings)
    rate = record["accepted"] / record["attempts"] if record["attempts"] else 0.0
    return {**record, "lost": lost, "rate": rate}


def _bars(counts: dict[str, int]) -> list[tuple[str, int, float]]:
    """(name, count, width in percent)"""
    most = max(counts.values(), default=0) or 1
    return [(name, count, 100 * count / most) for name, count in counts.items()]


def _difficulty(rates: dict[str, dict[str, float]]) -> list[tuple[str, float, list[tuple[str, int, float]]]]:
    """Per reference policy: name, mean pass rate, histogram of the tasks' pass rates."""
    found = []
    for policy in next(iter(rates.values()), {}):
        values = [rate[policy] for rate in rates.values()]
        bins = Counter(min(int(value * BINS), BINS - 1) for value in values)
        bars = _bars({f"{i / BINS:.0%} – {(i + 1) / BINS:.0%}": bins[i] for i in range(BINS)})
        found.append((policy, sum(values) / len(values), bars))
    return found


def _sample_evenly(items: Sequence[Candidate], count: int) -> list[Candidate]:
    """At most `count` of the items, evenly spaced."""
    step = max(1, len(items) // count)
    return list(items[::step][:count])


def _dialogue(candidate: Candidate, rates: dict[str, dict[str, float]]) -> dict[str, Any]:
    instance = candidate.instance
    return {
        "title": instance.id if instance else "no task",
        "issues": ", ".join(instance.issues) if instance else "",
        "round": candidate.round,
        "version": candidate.version,
        "stage": candidate.stage,
        "findings": candidate.findings,
        "rates": rates.get(instance.id, {}) if instance else {},
        "messages": [_message(m) for m in candidate.rollout.messages[1:]] if candidate.rollout else [],
        "checker": json.dumps(instance.to_json()["checker"], indent=1, default=str) if instance else "",
        "gold": [f"{s.by}: {s.name}({_arguments(s.arguments)})" for s in instance.gold] if instance else [],
    }


def _message(message: dict[str, Any]) -> tuple[str, str]:
    calls = [call["function"] for call in message.get("tool_calls") or []]
    text = "; ".join(f"{call['name']}({_arguments(call['arguments'])})" for call in calls)
    return ("call" if calls else message["role"]), text or message["content"]


def _arguments(arguments: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
