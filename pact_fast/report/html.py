"""Writes report.html and view.html of a run directory: one template, everything inline, nothing fetched.

Rollouts come from a model and from tools, so they are untrusted. They reach the page only as JSON in a data block, and
the page's script puts them into text nodes. A content security policy is the second line of defence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from pact_fast.components import Component
from pact_fast.files import OTHER_FILE_CURE, write_named, write_text
from pact_fast.report import charts
from pact_fast.report.before_after import comparisons, percent, points
from pact_fast.report.run_data import Rollout, Run, TokenColumns, read_run

REPORT_ROLLOUTS = 60
VIEW_ROLLOUTS = 300
TOKENS_PER_PAGE = 400_000  # about 15 MB of HTML; the middle of long rollouts is left out to stay below it
PROMPT_CHARACTERS = 20_000

T = TypeVar("T")


def write_report(run_dir: Path | str) -> Path:
    """Write run_dir/report.html: before and after, curves, sampled rollouts. Returns its path.

    Works on a run that is in progress or was killed: missing files are left out, truncated lines are skipped and named.

    Raises:
        PactError: There is no such directory.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir, rollouts=REPORT_ROLLOUTS)
    path = run_dir / "report.html"
    write_text(path, _page(run, report=True))
    return path


def write_view(
    run_dir: Path | str, out: Path | str | None = None, step: int | None = None, limit: int = VIEW_ROLLOUTS
) -> Path:
    """Write a page of rollouts. Returns its path.

    Args:
        run_dir: The run directory.
        out: File to write; default: run_dir/view.html.
        step: Only this step; default: all.
        limit: Most rollouts on the page.

    Raises:
        PactError: There is no such directory, no rollouts of `step`, or the file cannot be written.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir, rollouts=limit, step=step)
    page = _page(run, report=False)
    if out:
        write_named(Path(out), page)
        return Path(out)
    write_text(run_dir / "view.html", page, OTHER_FILE_CURE)
    return run_dir / "view.html"


def _page(run: Run, *, report: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(percent=percent, points=points)
    panels = charts.panels(run.metrics) if report else []
    cap = max(200, TOKENS_PER_PAGE // max(len(run.rollouts), 1))
    data = {
        "components": [component.name.lower().replace("_", " ") for component in Component],
        "charts": [panel.readout for panel in panels],
        "rollouts": [_rollout(rollout, cap) for rollout in run.rollouts],
    }
    embedded = embed_json(data)
    return environment.get_template("page.html").render(
        run=run,
        report=report,
        comparisons=comparisons(run.summary) if report else [],
        facts=_facts(run),
        versions=_versions(run),
        frame=charts,
        panels=panels,
        data=embedded,
        # Only scripts with this nonce may run. Anything injected is part of the data, and no data can contain its own
        # digest.
        nonce=hashlib.sha256(embedded.encode()).hexdigest()[:32],
    )


def embed_json(value: Any) -> str:
    """JSON that is safe inside a <script> element: no '<', no '>', no '&', ASCII only."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _rollout(rollout: Rollout, cap: int) -> dict[str, Any]:
    return {
        "step": rollout.step,
        "kind": rollout.kind,
        "task": rollout.task_id,
        "route": rollout.route,
        "stop": rollout.stop_reason.replace("_", " "),
        "reward": _round(rollout.reward),
        "parts": {key: _round(value) for key, value in rollout.reward_parts.items()},
        "turnRewards": [_round(value) for value in rollout.turn_rewards],
        "success": rollout.success,
        "question": rollout.question[:PROMPT_CHARACTERS],
        "prompt": _middle_out(rollout.prompt),
        "response": _columns(rollout.response, cap),
        "expert": _columns(rollout.expert, cap) if rollout.expert and len(rollout.expert) else None,
    }


def _columns(tokens: TokenColumns, cap: int) -> dict[str, Any]:
    """Columns for the page. Beyond `cap` tokens the middle is left out; `cut` is [tokens before it, tokens left out]."""
    dropped = max(0, len(tokens) - cap)
    head = cap // 2

    def shortened(column: Sequence[T]) -> list[T]:
        return [*column[:head], *column[head + dropped :]] if dropped else list(column)

    return {
        "text": shortened(tokens.text),
        "component": shortened(tokens.components),
        "sampled": [int(flag) for flag in shortened(tokens.sampled)],
        "turn": shortened(tokens.turns),
        "logprob": [_round(v) for v in shortened(tokens.logprobs)],
        "advantage": [_round(v) for v in shortened(tokens.advantages)],
        "weight": [_round(v) for v in shortened(tokens.weights)],
        **({"branch": shortened(tokens.branches)} if tokens.branches else {}),
        "cut": [head, dropped] if dropped else None,
    }


def _middle_out(text: str) -> str:
    left_out = len(text) - PROMPT_CHARACTERS
    if left_out <= 0:
        return text
    head = PROMPT_CHARACTERS // 2
    return f"{text[:head]}\n\n… {left_out:,} characters left out …\n\n{text[head + left_out :]}"


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _facts(run: Run) -> list[tuple[str, str]]:
    """Label and value of the line under the title."""
    summary = run.summary
    last = run.metrics[-1]["step"] if run.metrics else None
    seconds = summary.get("wall_seconds")
    facts = [
        ("recipe", summary.get("recipe")),
        ("algorithm", summary.get("algorithm")),
        ("steps", summary.get("steps", last)),
        ("wall time", duration(seconds) if isinstance(seconds, (int, float)) else None),
        ("seed", summary.get("seed")),
    ]
    return [(label, str(value)) for label, value in facts if value is not None]


def _versions(run: Run) -> list[tuple[str, str]]:
    versions = run.summary.get("versions")
    return [(str(k), str(v)) for k, v in versions.items()] if isinstance(versions, dict) else []


def duration(seconds: float) -> str:
    """`9 min 12 s`: seconds in the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
