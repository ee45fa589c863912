"""Tiny training runs, each in a process of its own, forked from one that has imported everything already.

The imports are most of a tiny run's time. Some tests start `python -m pact_fast` itself instead; it does the same work.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.models import TINY
from tests.support.processes import ROOT, WARM, redirect_output

# Tokenizers that runs with these settings would otherwise train first, on a thousand tasks: a third of a tiny run's
# CPU time. tests/test_tokenizer.py checks that they are equal.
TOKENIZERS = {
    "quickstart": ROOT / "tests/data/tokenizer_quickstart",
    "tiny": ROOT / "tests/data/tokenizer_lookup_chain",
}

SETTINGS = [
    "trainer.max_steps=8",
    "trainer.save_steps=1",
    "trainer.prompts_per_step=4",
    "trainer.prompts_per_update=2",
    "trainer.eval_tasks=6",
    "trainer.eval_steps=4",
    "trainer.learning_rate=1e-3",
    "trainer.lr_scheduler_type=cosine",
    "rollout.num_generations=2",
    "rollout.max_turn_tokens=12",
    "rollout.max_completion_length=40",
    "algorithm.reward.gamma=0.8",
    "algorithm.beta=0.01",
    "pretrain.steps=3",
    "pretrain.batch_size=2",
    "model.random_init.hidden_size=32",
    "model.random_init.intermediate_size=32",
    "model.random_init.num_hidden_layers=2",
    "model.random_init.head_dim=8",
    f"model.tokenizer={TOKENIZERS['quickstart']}",
    "threads=1",
]


def metrics(run: Path) -> list[dict]:
    """All records without values that depend on a clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time/") and k != "tokens_per_second"} for r in records]


TINY_RUN = {  # a recipe of one step
    "model": {"random_init": TINY, "tokenizer": str(TOKENIZERS["tiny"])},
    "env": {"name": "lookup_chain"},
    "rollout": {"num_generations": 2, "max_turn_tokens": 8, "max_completion_length": 24, "max_prompt_length": 500},
    "trainer": {"max_steps": 1, "prompts_per_step": 2, "eval_tasks": 3, "save_steps": 1},
    "threads": 1,
}
QUICKSTART = [
    "quickstart", *SETTINGS, "trainer.max_steps=4", "trainer.eval_steps=2", "trainer.eval_tasks=2",
    "trainer.save_total_limit=9", "trainer.log_completions=0",
]  # fmt: skip
DEADLINE = 180.0  # seconds for a run that takes two on a quiet machine: nothing may hang
STEPS = [0, 1, 2, 2, 3, 4, 4]  # of the records of an undisturbed run


class RunProcess:
    """A run of `pact-fast train` in a process of its own, started at once.

    Args:
        run: its output directory; a run that is there already is resumed.
        settings: `key=value` overrides.
        recipe: recipe and settings that come first.
        inject: called in the process before the run begins, to inject a fault.
        file_size: the largest file in bytes that the system lets the process write; -1 for no limit.
        log: where its output goes; default: beside the output directory.
    """

    def __init__(
        self,
        run: Path,
        *settings: str,
        recipe: list[str] = QUICKSTART,
        inject: Callable[[], object] | None = None,
        file_size: int = -1,
        log: Path | None = None,
    ):
        self.log = log or run.with_name(f"{run.name}.log")
        arguments = ["train", *recipe, f"output_dir={run}", "resume=auto", *settings]
        self._process = WARM.Process(target=_run, args=(arguments, self.log, inject, file_size), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def exit_code(self, seconds: float = DEADLINE) -> int:
        """Waits for the end: the exit status, or minus the signal that ended it. Fails after `seconds`."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output()}")
        return self._process.exitcode

    def succeed(self) -> RunProcess:
        assert self.exit_code() == 0, self.output()
        return self

    def error(self) -> str:
        """Waits for the end, which must be an error that the user can fix: its one line."""
        assert self.exit_code() == 2, self.output()
        assert "Traceback" not in self.output(), self.output()
        (line,) = [line for line in self.output().splitlines() if line.startswith("error: ")]
        assert self.output().splitlines()[-1] == line
        return line

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _run(arguments: list[str], log: Path, inject: Callable[[], object] | None, file_size: int) -> None:
    from pact_fast.cli.main import main

    redirect_output(log)
    if file_size >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if inject:
        inject()
    sys.exit(main(arguments))


def cut_back(source: Path, run: Path, step: int) -> Path:
    """A copy of a finished run as if it had been killed after the checkpoint of `step` (and some work that is lost)."""
    shutil.copytree(source, run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    for name in ("summary.json", "report.html"):
        (run / name).unlink(missing_ok=True)
    return run


def saved(run: Path) -> list[int]:
    """Steps of the checkpoints. There must be nothing else in their folder."""
    folder = run / "checkpoints"
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir()) if folder.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(run: Path, other: Path) -> None:
    """Metrics, the summary and the last weights, bit for bit."""
    assert metrics(run) == metrics(other)
    same = ("base_success", "success", "base_greedy", "greedy", "steps", "seed")
    mine, theirs = (json.loads((r / "summary.json").read_text()) for r in (run, other))
    assert {key: mine[key] for key in same} == {key: theirs[key] for key in same}
    weights = f"checkpoints/step_{saved(other)[-1]}/model/model.safetensors"
    assert (run / weights).read_bytes() == (other / weights).read_bytes()
