"""`pact-fast traces`: expert traces for rows, made and verified by execution."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pact_fast.cli.language_model import add_llm, llm_config

DESCRIPTION = """\
Make expert traces for the rows of a file, and keep those that pass a verification by execution. PACT learns from rows
with a trace.

Source of the calls:
  --calls reference   the row's calls (column reference_calls, or an expert trace), executed in the row's environment.
                      Missing reasoning is filled in from a template. The column `reasoning` of the new rows names its
                      source: template, row or teacher.
  --calls teacher     a language model behind an OpenAI-compatible endpoint, which acts in the environment.

A trace is kept if the environment's success is 1 (or, for environments without success, the row's answer is given), if
replaying it gives the same observations, and if it does not write the answer before a tool has stated it.
OUT/train.jsonl has the rows with traces, OUT/rejected.jsonl every other row with its reasons, OUT/summary.json the
counts. A killed command continues when it is repeated, and writes the same files. docs/traces.md
"""
EXAMPLES = """\
  pact-fast traces rows.jsonl -o traces
  pact-fast traces bfcl-train.jsonl -o bfcl-traces env.name=bfcl
  pact-fast traces ftrl_train.parquet -o ftrl-traces --calls teacher --attempts 4 \\
      --llm model=NAME --llm base_url=https://host/v1 --llm api_key_env=MY_KEY rollout.max_turns=10
  pact-fast traces rows.jsonl -o traces --segments model --llm model=NAME --llm base_url=http://localhost:8000/v1
  pact-fast train mine.yaml algorithm.name=pact data.train=traces/train.jsonl
"""


def add_traces(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to those of `pact-fast`."""
    parser = command(commands, "traces", _run, "make and verify expert traces", DESCRIPTION, EXAMPLES)
    parser.add_argument("source", metavar="FILE", help="rows: JSONL, JSON array, parquet, or hf://org/name:split")
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        help="settings: env.name, env.args, rollout.max_turns, data.format, …",
    )
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--calls", choices=["reference", "teacher"], default="reference",
        help="source of the calls (default: reference)",
    )  # fmt: skip
    parser.add_argument(
        "--attempts", type=int, default=1, help="episodes of the teacher per row, until one is kept (default: 1)"
    )
    parser.add_argument(
        "--segments", choices=["rules", "model"], default="rules",
        help="segmentation of the reasoning; model: by the language model, with the rules as fallback (default: rules)",
    )  # fmt: skip
    add_llm(parser, "settings of the teacher, or of the model that finds segments")
    parser.add_argument("--limit", type=int, help="read only this many rows (default: all)")


def _run(arguments: argparse.Namespace) -> int:
    from pact_fast.config.load import config_from
    from pact_fast.llm import LLMClient
    from pact_fast.synthesis.traces.pipeline import Settings, make_traces
    from pact_fast.train.progress import Progress
    from pact_fast.train.run_lock import RunLock

    settings = Settings(arguments.calls, arguments.attempts, arguments.segments, arguments.limit)
    language_model = _language_model(arguments)
    data = {"model": {"path": "none"}, "data": {"train": arguments.source}}  # no model is read
    config = config_from(data, arguments.settings, arguments.source)
    progress = Progress()
    lock = RunLock(arguments.out, progress.note)
    try:
        with LLMClient(language_model, "teacher") if language_model else nullcontext() as client:
            with _Bar(progress) as bar:
                summary = make_traces(config, arguments.out, settings, client, bar.show)
            if client is not None:
                _print_usage(client.report(), progress.note)
    finally:
        progress.close()
        lock.release()
    _print(summary, arguments.out)
    return 0


class _Bar:
    """The progress bar of rows, which begins when their number is known."""

    def __init__(self, progress: Any):
        self._progress = progress
        self._phase: Any = None
        self._advance: Callable[[str], None] = lambda info: None
        self._shown = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)

    def show(self, done: int, rows: int, kept: int) -> None:
        if self._phase is None:
            self._phase = self._progress.phase("rows", rows)
            self._advance = self._phase.__enter__()
        while self._shown < done:
            self._shown += 1
            self._advance(f"{kept} traces")


def _language_model(arguments: argparse.Namespace) -> Any:
    """The settings of the language model, None where none is asked. PactError for options that do not go together."""
    from pact_fast.errors import PactError

    for name in ("attempts", "limit"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise PactError(f"--{name} must be at least 1")
    if arguments.attempts > 1 and arguments.calls != "teacher":
        raise PactError("--attempts belongs to a teacher; add --calls teacher")
    asked = arguments.calls == "teacher" or arguments.segments == "model"
    if asked and not arguments.llm:
        raise PactError(
            "--calls teacher and --segments model need a model: add --llm model=NAME, and --llm base_url=URL for an endpoint"
        )
    if not asked and arguments.llm:
        raise PactError("--llm has no effect by itself: add --calls teacher or --segments model")
    return llm_config(arguments.llm, arguments.out) if asked else None


def _print_usage(report: dict[str, Any], note: Callable[[str], None]) -> None:
    for row in report.get("usage", []):
        tokens = row["prompt_tokens"] + row["completion_tokens"]
        note(f"{row['role']}: {row['requests']} requests, {row['hits']} answers from the cache, {tokens:,} tokens")


def _print(summary: dict[str, Any], out: Path) -> None:
    from pact_fast.synthesis.traces.verify import REASONS

    print(f"{summary['kept']} of {summary['rows']} rows have a verified trace: {out / 'train.jsonl'}")
    for kind, count in summary["reasoning"].items():
        print(f"  {count:6} with reasoning of kind {kind}")
    if summary["reasons"]:
        print(f"rejected, with reasons in {out / 'rejected.jsonl'}:")
    for reason, count in summary["reasons"].items():
        print(f"  {count:6} {reason}: {REASONS.get(reason, '')}")
