"""Runs on files with too many rows to hold in memory, and the cost of such files."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from benchmarks import scale, scale_rows
from tests.support.faults import at_call
from tests.support.runs import TINY_RUN, RunProcess, metrics

ROWS = 23
ARGS = {"codes": {"add": "def add(a, b):\n    return a + b"}, "scoring": "toolhop"}
LONG = {"prompt": "How warm is it? " * 400, "answer": "7", "env_args": ARGS}
BAD = {5: {"prompt": ""}, 11: LONG, 17: {"prompt": "a", "env": "nowhere"}}


def many(cache: Path, held: int = 3) -> None:
    """Few rows are already too many to hold, and few are looked at before the first step."""
    from pact_fast.data import drawn_tasks, row_cache, sources

    row_cache.cache_folder = lambda: cache
    sources.HELD_ROWS, drawn_tasks.CHECKED_FIRST, drawn_tasks.CHECKED_ANYWHERE = held, 3, 2


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def many_and_die(cache: Path, place: str, number: int) -> None:
    many(cache)
    at_call(place, number, die)


@pytest.fixture
def recipe(tmp_path):
    """Makes a recipe of six steps over files of 23 rows: epochs end within steps."""

    def make(bad: bool = True) -> list[str]:
        row = {"answer": "7", "env_args": ARGS}
        rows = [{"id": f"t{n}", "prompt": f"What is {n} + 1?", **row} for n in range(ROWS)]
        for n, row in BAD.items() if bad else ():
            rows[n] = row
        file = tmp_path / "train.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {
            "data": {"train": str(file), "eval": str(file), "on_bad_row": "skip"},
            "env": {"name": "python_tools"},
            "algorithm": {"name": "grpo"},
            "trainer": TINY_RUN["trainer"] | {"max_steps": 6, "prompts_per_step": 8, "eval_tasks": 5, "eval_steps": 3},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(TINY_RUN | settings))
        return [str(path)]

    return make


@pytest.mark.slow
def test_killed_while_it_indexes_and_while_it_trains_a_run_ends_bit_for_bit_the_same(recipe, tmp_path):
    """With bad rows, which are found before the first step or when they are drawn, in any of the processes."""
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    RunProcess(whole, recipe=recipe(), inject=functools.partial(many, tmp_path / "other")).succeed()
    places = [("pact_fast.data.line_index:_Lines.__init__", 1), ("pact_fast.train.learner:Learner.update", 5)]
    for place, number in places:
        inject = functools.partial(many_and_die, cache, place, number)
        assert RunProcess(killed, recipe=recipe(), inject=inject).exit_code() == -signal.SIGKILL
    again = RunProcess(killed, recipe=recipe(), inject=functools.partial(many, cache)).succeed()
    assert "resuming" in again.output() and "of 46 rows are checked, the others" in again.output()
    assert metrics(killed) == metrics(whole)
    weights = "checkpoints/step_6/model/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert not list(cache.glob("rows/*/.*"))  # nothing is left of the first one
    listed = [{json.loads(line)["line"] for line in skipped(run)} for run in (killed, whole)]
    assert listed == [{6, 12, 18}] * 2


def skipped(run: Path) -> list[str]:
    lines = (run / "skipped_rows.jsonl").read_text().splitlines()
    assert len(set(lines)) == len(lines)
    return lines


@pytest.mark.slow
def test_a_run_is_that_of_rows_that_are_held(recipe, tmp_path):
    settings = recipe(bad=False)
    for name, held in (("drawn", 3), ("held", 100)):
        RunProcess(tmp_path / name, recipe=settings, inject=functools.partial(many, tmp_path / "cache", held)).succeed()
    assert metrics(tmp_path / "drawn") == metrics(tmp_path / "held")


@pytest.mark.slow
def test_a_bad_row_that_ends_a_run_can_be_skipped_when_it_is_resumed(recipe, tmp_path):
    run, inject = tmp_path / "run", functools.partial(many, tmp_path / "cache")
    settings = [*recipe(), "data.shuffle=false", "data.eval=null", "trainer.eval_steps=null"]
    error = RunProcess(run, "data.on_bad_row=error", recipe=settings, inject=inject).error()
    whole = RunProcess(tmp_path / "whole", recipe=settings, inject=inject).succeed()
    assert "train.jsonl:12: field 'prompt'" in error or "train.jsonl:6: field 'prompt'" in error
    assert whole.exit_code() == 0


@pytest.mark.slow
@pytest.mark.timing
def test_rows_cost_no_memory_and_little_time():
    """From 60,000 to 180,000 rows of 1 kB. All rows were held before: 10 to 14 kB each, and 0.1 ms to read it."""
    small, large = (scale_rows.measure_rows(count, size=1000) for count in (60_001, 180_000))
    assert large.more["MB"] - small.more["MB"] < 12  # the permutation, and which rows have been checked: 0.5 MB
    assert large.seconds < 3 and scale.exponent([small, large]) < 1.1
