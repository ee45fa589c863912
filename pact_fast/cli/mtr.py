"""`pact-fast data mtr`: tools and traces from a file of QA rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pact_fast.cli.language_model import add_llm, llm_config

DESCRIPTION = """\
Make tasks with simulated tools and verified expert traces from rows of HotpotQA, MuSiQue, 2WikiMultiHopQA, Bamboogle or
FlashRAG, by rules. Rows with decompositions or triples become tasks with traces (train.jsonl, for `pact-fast train`).
Other rows become tasks without traces (tasks.jsonl), with a tool that searches the row's passages; with --llm, a
language model writes further tools. A killed command continues when it is repeated, and writes the same files. docs/mtr.md
"""
EXAMPLES = """\
  pact-fast data mtr musique_train.jsonl -o mtr-data
  pact-fast data mtr dev.json -o mtr-data --max-rows 1000 --fault timeout=0.05
  pact-fast data mtr hotpot_train.json -o mtr-data --llm llm.yaml
"""


def add_mtr(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to those of `pact-fast data`."""
    parser = command(commands, "mtr", _run, "tools and verified traces from QA rows", DESCRIPTION, EXAMPLES)
    parser.add_argument("file", metavar="FILE", type=Path, help="QA rows: JSONL, a JSON array, parquet or CSV")
    parser.add_argument("-o", "--out", metavar="DIR", type=Path, required=True, help="folder to write")
    parser.add_argument("--max-rows", type=int, help="read only this many rows (default: all)")
    parser.add_argument("--max-turns", type=int, help="longest trace that is kept, in assistant turns (default: 8)")
    parser.add_argument(
        "--fault", metavar="KIND=P", action="append", default=[],
        help="probability of an injected fault (timeout, rate_limited, empty), for traces that recover",
    )  # fmt: skip
    add_llm(parser, "settings of a language model that writes tools for rows without a plan")


def _run(arguments: argparse.Namespace) -> int:
    from pact_fast.errors import PactError
    from pact_fast.synthesis.mtr.pipeline import Settings
    from pact_fast.synthesis.mtr.verify import MAX_TURNS

    faults = {}
    for item in arguments.fault:
        kind, _, value = item.partition("=")
        try:
            faults[kind] = float(value)
        except ValueError:
            raise PactError(f"--fault {item}: write a kind and a probability, for example timeout=0.1") from None
    for name in ("max_rows", "max_turns"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise PactError(f"--{name.replace('_', '-')} must be at least 1")
    settings = Settings(arguments.max_rows, arguments.max_turns or MAX_TURNS, faults or None)
    with _tool_maker(arguments) as (maker, workers):
        manifest = _make(arguments, settings, maker, workers)
    print(f"{manifest['kept']} of {manifest['rows']} rows have a verified trace: {arguments.out / 'train.jsonl'}")
    for reason, count in manifest["reasons"].items():
        print(f"  {count:6} {reason}")
    if manifest["without_trace"]:
        print(f"{manifest['without_trace']} tasks without a trace: {arguments.out / 'tasks.jsonl'}")
    print(f"report: {arguments.out / 'report.html'}")
    return 0


def _make(arguments: argparse.Namespace, settings: Any, maker: Any, workers: int) -> dict[str, Any]:
    """`make_dataset` with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from pact_fast.synthesis.mtr.pipeline import make_dataset

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("rows", total=arguments.max_rows)

        def show(done: int, kept: int) -> None:
            bars.update(bar, completed=done, description=f"{kept} traces of {done} rows")

        return make_dataset(arguments.file, arguments.out, settings, show, maker, workers)


@contextmanager
def _tool_maker(arguments: argparse.Namespace) -> Iterator[tuple[Any, int]]:
    """(the tool maker of --llm, connected while it is needed, rows at the same time); (None, 1) without one."""
    if not arguments.llm:
        yield None, 1
        return
    from pact_fast.llm import LLMClient
    from pact_fast.synthesis.mtr.model_tool_maker import ModelToolMaker

    config = llm_config(arguments.llm, arguments.out)
    with LLMClient(config, "tool_maker") as client:
        yield ModelToolMaker(client), config.max_concurrency
