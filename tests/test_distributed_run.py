"""Whole runs under torchrun: two processes give what one gives, and a run may go on with another number of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_resume import SETTINGS

STAGES = {
    "replicated": [],
    "zero2": ["trainer.deepspeed.stage=2", "trainer.max_tokens_per_pack=null"],
    "zero3": ["trainer.deepspeed.stage=3"],
}
SHORT = ["trainer.max_steps=4", "trainer.save_steps=2", "trainer.eval_steps=2"]
CLOCK = ("time/", "tokens_per_second")
PACKS = ("sharing/", "tokens/")  # how trees are cut depends on the number of processes
ROUNDING = ("mismatch/", "gap", "approx_kl")  # differences of two roundings


def command(run: Path, processes: int, *settings: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [
        sys.executable, *(launcher if processes > 1 else []), "-m", "pact_fast", "train", "quickstart", f"output_dir={run}",
        "resume=auto", *SETTINGS, *SHORT, *settings,
    ]  # fmt: skip


def train(run: Path, processes: int, *settings: str) -> None:
    done = subprocess.run(command(run, processes, *settings), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


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


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_give_what_one_gives_and_each_goes_on_with_the_others_checkpoint(stage, alone, tmp_path):
    if stage != "replicated":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    two = tmp_path / "two"
    train(two, 2, *STAGES[stage])
    assert_same(two, alone)
    # without ZeRO a checkpoint is made and read as by one process
    for source, processes, settings in ((two, 1, []), (alone, 2, STAGES[stage])) if STAGES[stage] else ():
        run = tmp_path / f"on_{processes}"
        shutil.copytree(source, run)
        shutil.rmtree(run / "checkpoints" / "step_4")
        train(run, processes, *settings)
        assert_same(run, alone)


@pytest.mark.slow
def test_a_killed_process_takes_the_others_with_it_and_the_run_goes_on(alone, tmp_path):
    """SIGKILL of one rank: no hang, an error that names the cause, and a resumed run that equals an undisturbed one."""
    run = tmp_path / "run"
    process = subprocess.Popen(command(run, 2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(records(run)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child_of_rank(process.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and time.monotonic() - killed < 45
    assert "another process has ended or hangs" in error and "resume=auto" in error
    train(run, 2)
    assert_same(run, alone)


def child_of_rank(launcher: int, rank: int) -> int:
    """torchrun's child with RANK=rank."""
    for line in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{line}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(line)
    raise AssertionError("no such child")
