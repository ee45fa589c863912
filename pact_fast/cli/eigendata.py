"""`pact-fast data eigendata`: tasks of a domain, with executable checkers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pact_fast.cli.language_model import add_llm, llm_config

DESCRIPTION = """\
Make tasks of a domain with executable checkers, and training dialogues (docs/eigendata.md). Every round plans, writes,
verifies and plays tasks; then prompts and workflow are revised from the failures. A stopped command continues when
it is repeated.
"""
EXAMPLES = """\
  pact-fast data eigendata helpdesk -o data/helpdesk
  pact-fast data eigendata shop/domain.py:Shop -o data/shop --rounds 5 --count 2000
  pact-fast data eigendata helpdesk -o data/helpdesk --llm llm.yaml --models planner,wording,user
"""


def add_eigendata(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to those of `pact-fast data`."""
    parser = command(commands, "eigendata", _run, "tasks of a domain, with checkers", DESCRIPTION, EXAMPLES)
    parser.add_argument("domain", metavar="DOMAIN", help="name of a domain, or file.py:Class")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write, or to continue")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of synthesis (default: 3)")
    parser.add_argument("--plans", type=int, default=64, help="pairs of synthesis and evaluation plan (default: 64)")
    parser.add_argument("--count", type=int, default=600, help="tasks to make in all rounds (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument(
        "--models", metavar="ROLES", default="",
        help="roles that a language model plays: planner, synthesizer, wording, verifier, agent, user, reflection (default: "
        "none)",
    )  # fmt: skip
    add_llm(parser, "settings of the language model")
    parser.add_argument("--workflow", type=Path, help="folder of prompts and workflow to begin with (default: shipped)")


def _run(arguments: argparse.Namespace) -> int:
    from pact_fast.envs.domain.base import make_domain
    from pact_fast.synthesis.eigendata.engine import DataEngine, Settings
    from pact_fast.synthesis.eigendata.export import export
    from pact_fast.synthesis.eigendata.report import write_report
    from pact_fast.train.progress import Progress

    models = tuple(sorted(filter(None, arguments.models.replace(" ", "").split(","))))
    settings = Settings(arguments.domain, arguments.seed, arguments.rounds, arguments.plans, arguments.count, models)
    domain = make_domain(arguments.domain)
    with _roles(arguments, models) as (roles, workers):
        engine = DataEngine(domain, arguments.out, settings, roles, start=arguments.workflow, workers=workers)
        progress = Progress()
        try:
            candidates = engine.run(progress.phase)
            data = export(engine, candidates, progress.phase)
        finally:
            progress.close()
    summary = data.summary
    progress.note(
        f"{summary['accepted']} of {summary['attempts']} attempts accepted: {summary['train']} training tasks, "
        f"{summary['held_out']} held out"
    )
    print(write_report(engine, data))
    return 0


@contextmanager
def _roles(arguments: argparse.Namespace, models: tuple[str, ...]) -> Iterator[tuple[Any, int]]:
    """(the roles, connected to the language model while they are needed; tasks at the same time)."""
    from pact_fast.errors import PactError

    if bool(models) != bool(arguments.llm):
        raise PactError("--models names the roles that a language model plays, and --llm its settings; give both")
    if not models:
        yield None, 1
        return
    from pact_fast.llm import LLMClient
    from pact_fast.synthesis.eigendata.make_roles import check_roles, make_roles

    check_roles(models)
    config = llm_config(arguments.llm, arguments.out)
    with LLMClient(config, "eigendata") as client:
        yield make_roles(models, client), config.max_concurrency
