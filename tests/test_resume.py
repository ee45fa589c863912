"""A run that is killed at any moment resumes, and its metrics equal those of a run that was left alone, bit for bit."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support.faults import at_call
from tests.support.runs import SETTINGS, TINY_RUN, RunProcess, cut_back, metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By the command itself; the others are forked (tests/support/runs.py)."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-m", "pact_fast", "train", "quickstart", f"output_dir={run}", "resume=auto", *SETTINGS]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return run


def test_a_run_repeats_itself_and_moves_its_weights(undisturbed):
    first = metrics(undisturbed)
    assert [r["step"] for r in first] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert len({r["loss"] for r in first if "loss" in r}) == 8


def kill_at(run: Path, lines: int, delay: float) -> None:
    """Start or resume the run, and SIGKILL it `delay` seconds after its metrics have so many lines."""
    process = RunProcess(run, recipe=["quickstart", *SETTINGS])
    file, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= lines):
        assert process.running, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    assert process.running, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    assert process.exit_code() == -signal.SIGKILL


@pytest.mark.timing
@pytest.mark.parametrize("seed", os.environ.get("PACT_KILL_SEEDS", "7").split(","))
def test_killed_at_five_random_moments_it_ends_bit_for_bit_the_same(seed, undisturbed, tmp_path):
    """With PACT_KILL_SEEDS=0,1,2,3,4 at twenty-five moments."""
    rng = random.Random(seed)
    target = tmp_path / "run"
    for lines in sorted(rng.sample(range(10), 5)):  # of the run's 11 lines, so that every life ends by a kill
        kill_at(target, lines, rng.uniform(0.0, 0.15))
    RunProcess(target, recipe=["quickstart", *SETTINGS]).succeed()
    assert metrics(target) == metrics(undisturbed)
    same = ("base_success", "success", "base_greedy", "greedy", "steps", "seed")
    ours, theirs = (json.loads((r / "summary.json").read_text()) for r in (target, undisturbed))
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    for pattern in ("model/*.safetensors", "rng.safetensors"):
        one, two = (next((r / "checkpoints/step_8").glob(pattern)).read_bytes() for r in (target, undisturbed))
        assert one == two, pattern


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_generators_do_not_depend_on_which_process_made_the_base_model(tmp_path):
    """Dropout draws from them. Killed between the base model and the first checkpoint, the run makes no base again."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY_RUN | {"pretrain": {"steps": 1, "batch_size": 1}}))
    recipe = [str(tmp_path / "tiny.yaml")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    RunProcess(whole, recipe=recipe).succeed()
    inject = functools.partial(at_call, "pact_fast.train.learner:Learner.update", 2, die)  # the first is of the base
    assert RunProcess(killed, recipe=recipe, inject=inject).exit_code() == -signal.SIGKILL
    assert (killed / "base").exists() and not (killed / "checkpoints").exists()
    again = RunProcess(killed, recipe=recipe).succeed()
    assert "base model" not in again.output()
    assert metrics(killed) == metrics(whole)
    states = [(run / "checkpoints/step_1/rng.safetensors").read_bytes() for run in (whole, killed)]
    assert states[0] == states[1]


def test_a_base_model_without_an_outcome_is_not_evaluated_again(tmp_path):
    """The evaluation at step 0 has no rate where the environment gives no success; a resumed run has made it all the same."""
    (tmp_path / "silent.py").write_text(
        "from pact_fast.envs.lookup_chain import LookupChain\n\n"
        "class Silent(LookupChain):\n    def reward(self, task, trajectory):\n        return {}\n"
    )
    settings = TINY_RUN | {"env": TINY_RUN.get("env", {}) | {"name": f"{tmp_path / 'silent.py'}:Silent"}}
    settings["trainer"] = TINY_RUN["trainer"] | {"max_steps": 2, "save_steps": 1, "eval_tasks": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    recipe, whole = [str(tmp_path / "tiny.yaml")], tmp_path / "whole"
    RunProcess(whole, recipe=recipe).succeed()
    killed = cut_back(whole, tmp_path / "killed", 1)
    RunProcess(killed, recipe=recipe).succeed()
    assert [record["step"] for record in metrics(whole)] == [0, 1, 2, 2]
    assert metrics(killed) == metrics(whole)
