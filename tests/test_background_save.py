"""Checkpoints that are written while training goes on: a copy of the moment, complete or invisible."""

import hashlib
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pact_fast.errors import PactError
from pact_fast.model import shards
from pact_fast.train import checkpoint
from pact_fast.train.run import Trainer
from tests.support.thread_world import run_threads


@pytest.fixture
def disk(monkeypatch):
    """A disk that writes nothing before `set`."""
    open_, write_file = threading.Event(), shards.write_file

    def slow(tensors, path):
        assert open_.wait(20)
        return write_file(tensors, path)

    monkeypatch.setattr(shards, "write_file", slow)
    yield open_
    open_.set()


def start(root: Path, step: int, tensor: torch.Tensor, **more) -> checkpoint.PendingSave:
    arguments = {"tensors": {"optimizer": {"w": tensor}}, "state": {"step": step}, "write_model": None, "keep": 2}
    return checkpoint.start_save(root, step, **arguments, budget=1 << 20, **more)


def test_training_goes_on_while_the_disk_is_slow_and_the_copy_is_of_the_moment(tmp_path, disk):
    weights = torch.ones(100)
    pending = start(tmp_path, 1, weights)
    weights += 1  # the next step
    assert not pending.ready() and checkpoint.latest(tmp_path) is None
    disk.set()
    path = pending.finish()
    assert checkpoint.latest(tmp_path, verify=True) == path == tmp_path / "step_1"
    assert torch.equal(checkpoint.load(path).tensors["optimizer"]["w"], torch.ones(100))
    assert os.listdir(tmp_path) == ["step_1"]


def test_copies_beyond_the_budget_wait_for_the_disk(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 400)
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(6)}  # one to a file
    writer, waiting = shards.BackgroundWriter(1000), []

    def copies():
        for item in tensors.items():
            waiting.append(writer._waiting)
            if len(waiting) == 4:
                disk.set()
            yield item

    shards.write(tmp_path, "x", copies(), writer)
    assert len(writer.finish()) == 6 and max(waiting) <= 1000


@pytest.mark.slow
def test_a_process_that_dies_while_it_writes_leaves_the_older_checkpoint(tmp_path, disk):
    disk.set()
    older = start(tmp_path, 1, torch.zeros(3)).finish()
    disk.clear()
    pid = os.fork()
    if not pid:
        start(tmp_path, 2, torch.ones(3))
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert checkpoint.latest(tmp_path, verify=True) == older
    assert [name for name in os.listdir(tmp_path) if name.startswith(".tmp-step_2-")]
    disk.set()
    start(tmp_path, 3, torch.ones(3)).finish()
    assert sorted(os.listdir(tmp_path)) == ["step_1", "step_3"]


def test_a_disk_that_fills_up_meanwhile_is_an_error_of_all_ranks(tmp_path, monkeypatch):
    start(tmp_path, 1, torch.zeros(3)).finish()
    write_file = shards.write_file

    def full(tensors, path):
        if "w" in tensors:
            raise OSError(28, "No space left on device")
        return write_file(tensors, path)

    monkeypatch.setattr(shards, "write_file", full)

    def work(world):
        pending = start(tmp_path, 2, torch.zeros(3), world=world)
        while not pending.ready():
            pass
        with pytest.raises(PactError, match=r"cannot save the checkpoint .*step_2: .*No space left on device"):
            pending.finish()
        return os.listdir(tmp_path)

    run_threads(work, 2)
    assert os.listdir(tmp_path) == ["step_1"]


def test_a_lost_lock_keeps_the_checkpoint_from_appearing(tmp_path):
    def lost():
        raise PactError("another process has taken the run")

    pending = start(tmp_path, 1, torch.zeros(3), before_rename=lost)
    with pytest.raises(PactError, match="another process"):
        pending.finish()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.uint8, torch.float64])
def test_files_are_those_of_safetensors_and_hashed_on_the_way(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(shards, "PIECE", 64)
    values = torch.arange(105).to(dtype)
    tensors = {
        "b": values.view(3, 5, 7), "é": values[:3], "one": values[1], "none": values[:0],
        "odd": torch.ones(3, dtype=torch.uint8), "turned": values.view(3, 35).T, "wide": torch.ones(2, dtype=torch.float64),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    found = shards.write_file({name: shards._cpu_copy(tensor) for name, tensor in tensors.items()}, path)
    data = path.read_bytes()
    assert found == (len(data), hashlib.sha256(data).hexdigest())
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(t.dtype == loaded[n].dtype and torch.equal(t, loaded[n]) for n, t in tensors.items())


def test_a_checkpoint_is_due_by_steps_or_by_the_clock(monkeypatch):
    trainer = Trainer.__new__(Trainer)
    trainer.world = SimpleNamespace(is_main=True, any=bool)
    trainer.config = SimpleNamespace(trainer=SimpleNamespace(save_steps=3, save_minutes=None))
    assert [step for step in range(1, 8) if trainer._save_is_due(step)] == [3, 6]
    trainer.config.trainer.save_minutes = 2.0
    trainer._saved_at = 100.0
    for now, due in ((100.0, False), (219.0, False), (220.0, True)):
        monkeypatch.setattr("pact_fast.train.run.time", SimpleNamespace(monotonic=lambda now=now: now))
        assert trainer._save_is_due(3) is due
