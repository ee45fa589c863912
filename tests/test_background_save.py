"""Checkpoints that are written while training continues: a snapshot, complete or invisible."""

import hashlib
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.config import AlgorithmConfig, TrainerConfig
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.model import shards, snapshot
from pact_fast.train import checkpoint, checkpoint_writer
from pact_fast.train.backends.replicated import Replicated
from pact_fast.train.learner import Learner
from pact_fast.train.run import Trainer
from tests.support.thread_world import run_threads

TRAINING = threading.current_thread()


def gate(monkeypatch, owner, name: str) -> threading.Event:
    """Other threads than this one wait in `owner.name` until the event is set."""
    open_, original = threading.Event(), getattr(owner, name)

    def slow(*arguments):
        assert threading.current_thread() is TRAINING or open_.wait(20)
        return original(*arguments)

    monkeypatch.setattr(owner, name, slow)
    return open_


@pytest.fixture
def disk(monkeypatch):
    """A disk that writes nothing before `set`."""
    open_ = gate(monkeypatch, shards, "write_file")
    yield open_
    open_.set()


@pytest.fixture
def copies(monkeypatch):
    """A thread that copies nothing before `set`."""
    open_ = gate(monkeypatch, shards, "host_copy")
    yield open_
    open_.set()


def start(root: Path, step: int, tensor: torch.Tensor, **more) -> checkpoint_writer.PendingSave:
    arguments = {"tensors": {"optimizer": {"w": tensor}}, "state": {"step": step}, "write_model": None, "keep": 2}
    return checkpoint_writer.start_save(root, step, **arguments, **{"budget": 1 << 20} | more)


def appears(root: Path, step: int, within: float = 10.0) -> bool:
    """Whether the checkpoint appears by itself."""
    deadline = time.monotonic() + within
    while not (root / f"step_{step}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return (root / f"step_{step}").exists()


def saved(path: Path) -> torch.Tensor:
    return checkpoint.load(path).tensors["optimizer"]["w"]


def test_training_goes_on_while_the_disk_is_slow_and_the_copy_is_of_the_moment(tmp_path, disk):
    weights = torch.ones(100)
    pending = start(tmp_path, 1, weights)
    weights += 1  # the next step
    assert not pending.ready() and checkpoint.latest(tmp_path) is None
    disk.set()
    path = pending.finish()
    assert checkpoint.latest(tmp_path, verify=True) == path == tmp_path / "step_1"
    assert torch.equal(saved(path), torch.ones(100))
    assert os.listdir(tmp_path) == ["step_1"]


def test_live_tensors_are_copied_meanwhile_and_may_change_afterwards(tmp_path, disk, copies):
    weights = torch.arange(100.0)
    pending = start(tmp_path, 1, weights[10:].view(9, 10), live=[weights])  # returns, though nothing is copied yet
    waiting = threading.Thread(target=pending.wait_copied)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    copies.set()
    waiting.join(10)
    assert not waiting.is_alive() and not pending.ready()
    weights += 1
    disk.set()
    assert torch.equal(saved(pending.finish()), torch.arange(10.0, 100.0).view(9, 10))


def test_other_tensors_than_the_live_ones_are_copied_at_once(tmp_path, copies):
    """A gathered or converted tensor is gone, or another one, when the thread would copy it."""
    weights = torch.ones(10)
    converted = weights * 2
    pending = start(tmp_path, 1, converted, live=[weights])
    converted.zero_()
    assert torch.equal(saved(pending.finish()), torch.full((10,), 2.0))


def test_all_that_adamw_changes_is_live():
    model = torch.nn.Linear(3, 2)
    backend = Replicated(SimpleNamespace(model=model), TrainerConfig(), World())
    model(torch.ones(3)).sum().backward()
    backend.step(0.1)
    writer = snapshot.SnapshotWriter(live=backend.changed_by_step())
    named = [*backend.state(), *model.named_parameters()]
    assert len(named) == 8 and all(writer.is_live(tensor) for _, tensor in named)
    assert not writer.is_live(torch.zeros(2)) and not writer.is_live(torch.zeros(0))
    writer.abandon()


def test_the_optimizer_waits_for_the_copies(monkeypatch):
    order = []
    model = SimpleNamespace(device=torch.device("cpu"))
    backend = SimpleNamespace(step=lambda rate: order.append("step") or 1.0)
    monkeypatch.setattr("pact_fast.train.learner.Policy", lambda *_: SimpleNamespace(unshared=None))
    monkeypatch.setattr("pact_fast.train.learner.make_backend", lambda *_: backend)
    algorithm = make_algorithm(AlgorithmConfig())
    learner = Learner(model, TrainerConfig(), algorithm, total_updates=1, before_step=lambda: order.append("copied"))
    assert learner.step() == 1.0 and order == ["copied", "step"]

    trainer = Trainer.__new__(Trainer)
    trainer._wait_for_copies()
    trainer._pending_save = SimpleNamespace(wait_copied=lambda: order.append("waited"))
    trainer._wait_for_copies()
    assert order[2:] == ["waited"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_appears_as_soon_as_all_have_written_it(ranks, tmp_path, disk, monkeypatch):
    monkeypatch.setattr(snapshot, "SHARD_BYTES", 40)
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}  # one to a file
    renamed = []

    def work(world: World) -> Path:
        pending = checkpoint_writer.start_save(
            tmp_path, 1, tensors={"optimizer": tensors}, state={}, write_model=None, keep=1, world=world, budget=1 << 20,
            after_rename=renamed.append,
        )  # fmt: skip
        world.all_gather(None)  # all have begun
        if world.is_main:
            assert not appears(tmp_path, 1, within=0.1)
            disk.set()
            assert appears(tmp_path, 1)  # nobody has called `ready` or `finish`
        return pending.finish()

    assert run_threads(work, ranks) == [tmp_path / "step_1"] * ranks == renamed * ranks
    found = checkpoint.load(checkpoint.latest(tmp_path, verify=True)).tensors["optimizer"]
    assert {name: float(tensor[0]) for name, tensor in found.items()} == {f"t{i}": float(i) for i in range(5)}
    assert sorted(p.name for p in (tmp_path / "step_1").iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("complete", [True, False])
def test_a_process_whose_peers_are_gone_completes_what_they_have_written(complete, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "NOTE_TIMEOUT", 5.0 if complete else 0.2)

    def work(world: World) -> checkpoint_writer.PendingSave:
        return start(tmp_path, 1, torch.ones(3), world=world)

    if complete:
        pending, other = run_threads(work, 2)
        other.finish_alone()
    else:
        monkeypatch.setattr(checkpoint_writer, "write_bytes", lambda *_: None)  # the part of rank 1
        pending, _ = run_threads(work, 2)
    pending.finish_alone()
    assert checkpoint.latest(tmp_path, verify=True) == (tmp_path / "step_1" if complete else None)


def test_copies_beyond_the_budget_wait_for_the_disk(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(snapshot, "SHARD_BYTES", 400)
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(6)}  # one to a file
    most = []

    def entries():
        for number, item in enumerate(tensors.items()):
            if number == 3:
                disk.set()
            yield item

    for live in ([], tensors.values()):
        disk.clear()
        writer = snapshot.SnapshotWriter(1000, live)
        write, held = writer._write, []
        writer._write = lambda write=write, held=held, writer=writer: (held.append(writer._held), write())
        snapshot.write(tmp_path, "x", entries(), writer)
        disk.set()
        writer.wait_copied()
        writer.close(most.append)
        assert writer.wait_ended() is None and len(held) == 7 and max(held) <= 1000
    assert [len(files) for files in most] == [6, 6]


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


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_fills_up_meanwhile_is_an_error_of_all_ranks(failing, tmp_path, monkeypatch):
    start(tmp_path, 1, torch.zeros(3)).finish()
    monkeypatch.setattr(snapshot, "SHARD_BYTES", 12)
    tensors = {"0": torch.zeros(3), "1": torch.zeros(3)}  # one for each rank
    write_file = shards.write_file

    def full(tensors, path):
        if str(failing) in tensors:
            raise OSError(28, "No space left on device")
        return write_file(tensors, path)

    monkeypatch.setattr(shards, "write_file", full)

    def work(world):
        pending = checkpoint_writer.start_save(
            tmp_path, 2, tensors={"optimizer": tensors}, state={}, write_model=None, keep=2, world=world
        )
        while not pending.ready():
            pass
        pending.wait_copied()
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


DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.uint8, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_those_of_safetensors_and_hashed_on_the_way(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(shards, "WRITE_BYTES", 64)
    values = torch.arange(105).to(dtype)
    tensors = {
        "b": values.view(3, 5, 7), "é": values[:3], "one": values[1], "none": values[:0],
        "odd": torch.ones(3, dtype=torch.uint8), "turned": values.view(3, 35).T, "wide": torch.ones(2, dtype=torch.float64),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    found = shards.write_file({name: shards.host_copy(tensor) for name, tensor in tensors.items()}, path)
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
