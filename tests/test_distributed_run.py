"""Whole runs under torchrun: two processes give the results of one, and a run may continue with another number of them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pact_fast.cli.main import main
from pact_fast.train import checkpoint
from tests.support.processes import Ranks, deepspeed_on_gloo, run_ranks
from tests.support.runs import SETTINGS, RunProcess

pytestmark = pytest.mark.slow

STAGES = {
    "replicated": [],
    "zero2": ["trainer.deepspeed.stage=2"],
    "zero3": ["trainer.deepspeed.stage=3"],
}
LAST = 3  # step; the one before it is saved, too
RECIPE = [
    "quickstart", *SETTINGS, f"trainer.max_steps={LAST}", "trainer.save_steps=2", "trainer.eval_steps=2",
    "trainer.eval_tasks=3", "pretrain.steps=1",
]  # fmt: skip
CLOCK = ("time/", "tokens_per_second")
PACKS = ("sharing/", "tokens/")  # how trees are cut depends on the number of processes
ROUNDING = ("mismatch/", "logprob_diff", "approx_kl")  # differences of two roundings


def command(run: Path, *settings: str) -> list[str]:
    return ["train", *RECIPE, f"output_dir={run}", "resume=auto", *settings]


def call_command(arguments: list[str]) -> None:
    """In each rank."""
    if any("deepspeed" in argument for argument in arguments):
        deepspeed_on_gloo()
    sys.exit(main(arguments))


def train(run: Path, processes: int, *settings: str) -> None:
    if processes == 1:
        RunProcess(run, *settings, recipe=RECIPE).succeed()
        return
    run_ranks(call_command, command(run, *settings), ranks=processes)


def without_last(run: Path, copy: Path) -> Path:
    """A copy of a run that goes on with its last step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / f"checkpoints/step_{LAST}")
    return copy


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path, other: Path) -> None:
    mine, theirs = records(run), records(other)
    assert [r["step"] for r in mine] == [r["step"] for r in theirs]
    for one, two in zip(mine, theirs, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            if key.startswith(CLOCK + PACKS) or any(part in key for part in ROUNDING):
                continue
            assert one[key] == pytest.approx(two[key], rel=1e-5, abs=1e-7), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    train(run, 1)
    return run


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_the_results_of_one_and_either_resumes_from_the_others_checkpoint(stage, alone, tmp_path):
    if stage != "replicated":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    two = tmp_path / "two"
    # what fits is estimated by all ranks, once: that takes longer than the rest of such a run
    train(two, 2, *STAGES[stage], *(["trainer.max_tokens_per_pack=null"] if stage == "zero2" else []))
    assert_same(two, alone)
    # without ZeRO a checkpoint is made and read as by one process
    going_on = {
        "zero2": [(two, 1, []), (two, 2, STAGES["zero3"])],
        "zero3": [(two, 1, []), (two, 2, STAGES["zero2"]), (alone, 2, STAGES[stage])],
    }
    for number, (source, processes, settings) in enumerate(going_on.get(stage, [])):
        run = without_last(source, tmp_path / f"on_{number}")
        train(run, processes, *settings)
        assert_same(run, alone)


@pytest.mark.parametrize("stage, other", [("zero2", "zero3"), ("zero3", "zero2")])
def test_fp32_copies_of_bf16_weights_are_resumed(stage, other, tmp_path):
    """Bit for bit, and by another stage, whose ranks have other parts, up to the roundings of two steps."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    whole = tmp_path / "whole"
    train(whole, 2, *STAGES[stage], "model.dtype=bfloat16")
    expected = checkpoint.load(whole / f"checkpoints/step_{LAST}").tensors["optimizer"]
    assert {name.rpartition("/")[2] for name in expected} == {"master", "exp_avg", "exp_avg_sq", "step"}
    for name in (stage, other):
        run = without_last(whole, tmp_path / name)
        train(run, 2, *STAGES[name], "model.dtype=bfloat16")
        found = checkpoint.load(run / f"checkpoints/step_{LAST}").tensors["optimizer"]
        for key, value in expected.items():
            if name == stage:
                assert torch.equal(found[key], value), key
            else:
                assert (found[key] - value).norm() <= 0.1 * value.norm(), key


@pytest.mark.timing
@pytest.mark.chaos
def test_a_killed_process_takes_the_others_with_it_and_the_run_goes_on(alone, tmp_path):
    """SIGKILL of one rank: no hang, an error that names the cause, and a resumed run that equals an undisturbed one."""
    run = tmp_path / "run"
    ranks = start(run)
    os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.wait(45, grace=45) == [2, -signal.SIGKILL], ranks.output(0)
    assert "another rank has ended or hangs" in ranks.output(0) and "resume=auto" in ranks.output(0)
    train(run, 2)
    assert_same(run, alone)


@pytest.mark.timing
@pytest.mark.chaos
def test_sigterm_to_one_process_ends_all_after_the_step(alone, tmp_path):
    """The step is finished and saved."""
    run = tmp_path / "run"
    ranks = start(run)
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert ranks.wait(60) == [0, 0], ranks.output(0)
    assert_saved(run, ranks.output(0))
    train(run, 1)
    assert_same(run, alone)


@pytest.mark.timing
@pytest.mark.chaos
def test_sigterm_to_torchrun_ends_all_after_the_step(alone, tmp_path):
    """torchrun itself ends with an error of its own then."""
    run = tmp_path / "run"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pact_fast",
    ]
    process = subprocess.Popen(
        [*launcher, *command(run)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: started(run), lambda: process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert_saved(run, error)
    train(run, 1)
    assert_same(run, alone)


@pytest.mark.timing
@pytest.mark.chaos
def test_sigterm_reaches_a_process_that_waits_for_the_base_model(tmp_path):
    """Python's handlers do not run while a library waits; rank 0 would be busy for hours here."""
    run = tmp_path / "run"
    ranks = start(run, "pretrain.steps=1000000", done=lambda: (run / "tokenizer").exists())
    time.sleep(1)  # until it waits; before that it would end at once in any case
    os.kill(ranks.pids[1], signal.SIGTERM)
    wait_until(lambda: ranks.exit_codes[1] is not None, lambda: False, seconds=60)
    os.kill(ranks.pids[0], signal.SIGTERM)  # as torchrun does then
    codes = ranks.wait(60, grace=60)
    assert all(code not in (0, -signal.SIGKILL) for code in codes), codes
    assert not (run / "base").exists() and not (run / "metrics.jsonl").exists()


def start(run: Path, *settings: str, done: Callable[[], bool] | None = None) -> Ranks:
    """A run of two ranks that has got so far; default: it has done a step."""
    run.parent.mkdir(exist_ok=True)
    ranks = Ranks(run.parent, call_command, command(run, *settings))
    wait_until(done or (lambda: started(run)), lambda: any(code is not None for code in ranks.exit_codes))
    return ranks


def started(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and len(records(run)) >= 2


def wait_until(done: Callable[[], bool], ended: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert not ended() and time.monotonic() < deadline
        time.sleep(0.02)


def assert_saved(run: Path, output: str) -> None:
    """The run was stopped and says which step it has saved."""
    newest = max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())
    assert f"stopped by SIGTERM: step {newest} is saved; continue with resume=auto" in output
    assert not (run / "summary.json").exists()
