"""Checkpoints: complete or invisible, exact, and never the reason for losing an older one."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from pact_fast.config import TrainerConfig
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.model import shards, snapshot
from pact_fast.train import checkpoint, checkpoint_writer, rng
from pact_fast.train.backends.replicated import Replicated


def content(step: int) -> dict[str, Any]:
    """Arguments of `save` that can be recognised again."""
    generator = torch.Generator().manual_seed(step)
    tensors = {"optimizer": {"w/exp_avg": torch.randn(16, 8, generator=generator), "w/step": torch.tensor(float(step))}}
    return {"tensors": tensors, "state": {"updates": step}}


def write_model(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    header = b"{}".ljust(992)
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def save(root: Path, step: int, keep: int = 3) -> Path:
    return checkpoint_writer.save(root, step, **content(step), write_model=write_model, keep=keep)


def check(path: Path) -> int:
    """Check that the checkpoint holds exactly the arguments of `save`; return its step."""
    loaded = checkpoint.load(path)
    expected = content(loaded.step)
    assert path.name == f"step_{loaded.step}"
    assert loaded.state == expected["state"]
    assert loaded.tensors.keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"]["optimizer"].items():
        assert torch.equal(loaded.tensors["optimizer"][name], tensor)
    assert loaded.model_dir is not None
    assert (loaded.model_dir / "model.safetensors").stat().st_size == 1000
    return loaded.step


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    path = save(root, 7)
    assert path == root / "step_7"
    assert check(path) == 7
    assert checkpoint.latest(root, verify=True) == path
    assert hidden(root) == []


def test_without_a_model_there_is_no_model_folder(tmp_path: Path) -> None:
    path = checkpoint_writer.save(tmp_path, 1, tensors={}, state={}, write_model=None, keep=1)
    assert checkpoint.load(path).model_dir is None


def test_no_checkpoints_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing") is None
    assert checkpoint.latest(tmp_path) is None


def test_floats_of_the_state_are_exact_and_nan_is_refused(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**53 + 1]
    path = checkpoint_writer.save(tmp_path, 1, tensors={}, state={"values": values}, write_model=None, keep=1)
    loaded = checkpoint.load(path).state["values"]
    assert [repr(v) for v in loaded] == [repr(v) for v in values]
    with pytest.raises(ValueError, match="JSON compliant"):
        checkpoint_writer.save(tmp_path, 2, tensors={}, state={"value": float("nan")}, write_model=None, keep=1)
    assert checkpoint.latest(tmp_path) == path
    assert hidden(tmp_path) == []


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_11"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (save(tmp_path, 5) / "extra").touch()
    assert check(save(tmp_path, 5)) == 5
    assert not (tmp_path / "step_5" / "extra").exists()
    assert hidden(tmp_path) == []


# damage


def damage_nothing_visible(path: Path) -> str:
    """One flipped bit: same size."""
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return "optimizer.safetensors"


def truncate(name: str) -> Any:
    def damage(path: Path) -> str:
        os.truncate(path / name, (path / name).stat().st_size - 1)
        return name

    return damage


def remove(name: str) -> Any:
    def damage(path: Path) -> str:
        (path / name).unlink()
        return name

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        truncate("optimizer.safetensors"),
        truncate("model/model.safetensors"),
        truncate("state.json"),
        truncate("manifest.json"),
        remove("model/config.json"),
        remove("manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_the_file(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    name = damage(newer)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == older
    assert len(caplog.messages) == 1
    assert "step_2" in caplog.messages[0]
    assert name in caplog.messages[0]
    with pytest.raises(PactError, match=name):
        checkpoint.load(newer)
    assert check(older) == 1


def test_a_flipped_bit_is_found_by_verify_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    name = damage_nothing_visible(newer)
    assert checkpoint.latest(tmp_path) == newer
    assert checkpoint.latest(tmp_path, verify=True) == older
    assert name in caplog.messages[0]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    truncate("state.json")(tmp_path / "step_3")
    save(tmp_path, 4, keep=2)
    # 2 and 4 are the newest complete ones
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3", "step_4"]
    save(tmp_path, 5, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_4", "step_5"]


# crashes


@pytest.mark.timing
@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_complete_newest_checkpoint(tmp_path: Path) -> None:
    """The writers are forks of this process, so that each costs milliseconds, not an import of torch."""
    rng = random.Random(0)
    root = tmp_path / "checkpoints"
    started = time.perf_counter()
    save(root, 1)
    duration = time.perf_counter() - started
    last, hidden_saves = 1, 0
    for _ in range(25):
        pid = os.fork()
        if pid == 0:
            try:
                step = last
                while True:
                    step += 1
                    save(root, step, keep=2)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, 6 * duration))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        hidden_saves += bool(hidden(root))
        for visible in root.glob("step_*"):
            check(visible)
        newest = checkpoint.latest(root, verify=True)
        assert newest is not None
        step = check(newest)
        assert step >= last  # saved checkpoints stay
        last = step
    assert hidden_saves >= 5  # otherwise the kills missed the saves
    assert last > 1
    save(root, last + 1, keep=2)
    assert hidden(root) == []


@pytest.mark.slow
def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".tmp-step_3-{dead.pid}", f".trash-step_1-{dead.pid}", f".tmp-step_3-{os.getpid()}"]
    alive = f".tmp-step_3-{os.getppid()}"
    for name in [*names, alive]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    (tmp_path / ".notes").touch()
    save(tmp_path, 3)
    assert hidden(tmp_path) == sorted([alive, ".notes"])


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["snapshot.shards.write_file", "_sync_tree", "_describe", "_sync"])
def test_a_full_disk_is_a_one_line_error_and_costs_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(tmp_path, 1, keep=1)
    monkeypatch.setattr(f"pact_fast.train.checkpoint_writer.{where}", full_disk)
    with pytest.raises(PactError, match=r"step_2.*No space left on device.*free some space") as caught:
        save(tmp_path, 2, keep=1)
    assert "\n" not in str(caught.value)
    assert check(before) == 1
    assert os.listdir(tmp_path) == ["step_1"]  # the half-written one gave its space back


@pytest.mark.slow
def test_a_write_that_the_system_refuses_is_the_same_error(tmp_path: Path) -> None:
    """For real: the process may not write files of more than 4 kB, which hits the safetensors writer."""
    before = save(tmp_path, 1)
    tensors = {"big": {"x": torch.zeros(100_000)}}
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's other threads did not come along
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            checkpoint_writer.save(tmp_path, 2, tensors=tensors, state={}, write_model=None, keep=1)
        except PactError as error:
            code = 42 if "step_2" in str(error) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 42
    assert os.listdir(tmp_path) == ["step_1"]
    assert check(before) == 1


def test_a_failing_model_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        write_model(path)
        raise RuntimeError("interrupted")

    save(tmp_path, 1)
    with pytest.raises(RuntimeError, match="interrupted"):
        checkpoint_writer.save(tmp_path, 2, **content(2), write_model=fail, keep=1)
    assert os.listdir(tmp_path) == ["step_1"]


# files


def test_large_tensors_go_to_several_files_and_come_back_one_by_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "SHARD_BYTES", 300)
    tensors = {f"t{i}": torch.arange(20.0) + i for i in range(9)}  # three to a file
    model = {"a.weight": torch.randn(20, 2), "b.weight": torch.randn(20, 2)}
    path = checkpoint_writer.save(
        tmp_path, 1, tensors={"optimizer": tensors, "rng": {}}, state={}, write_model=None, weights=model, keep=1
    )
    names = [f"optimizer-{i:05d}.safetensors" for i in range(3)]
    assert sorted(p.name for p in path.glob("*.safetensors")) == [*names, "rng.safetensors"]
    saved = checkpoint.load(path)
    assert saved.tensors.keys() == {"optimizer", "rng"} and len(saved.tensors["rng"]) == 0
    assert saved.tensors["optimizer"].keys() == tensors.keys()
    assert all(torch.equal(saved.tensors["optimizer"][key], value) for key, value in tensors.items())
    index = json.loads((path / "model/model.safetensors.index.json").read_text())  # as Hugging Face's readers want it
    for key, value in model.items():
        assert torch.equal(load_file(path / "model" / index["weight_map"][key])[key], value)
    assert not (path / "model/model.safetensors").exists()  # they would take it for the whole
    (path / names[1]).write_bytes(b"")
    assert checkpoint.latest(tmp_path) is None


def test_model_shards_are_read_by_hugging_face_with_one_file_in_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "MODEL_SHARD_BYTES", 10_000)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    alive: list[weakref.ref] = []
    most = 0

    original = shards.host_copy

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        copy = original(tensor)
        alive.append(weakref.ref(copy))
        most = max(most, sum(ref().nbytes for ref in alive if ref() is not None))
        return copy

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        buffer = torch.empty(max(weight.numel() for weight in weights.values()))  # one buffer for all, as under ZeRO-3
        for name, weight in weights.items():
            tensor = buffer[: weight.numel()].view(weight.shape)
            yield name, tensor.copy_(weight)

    monkeypatch.setattr(shards, "host_copy", copied)
    config.save_pretrained(tmp_path)
    shards.write_model_shards(gathered(), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == "model-00001.safetensors" and set(index["weight_map"].values()) == set(files)
    assert index["metadata"] == {"total_size": sum(weight.nbytes for weight in weights.values())}
    assert most <= 10_000
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_model_shards_that_cannot_be_written_are_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model-00001\.safetensors.*No such file"):
        shards.write_model_shards([("weight", torch.zeros(1))], tmp_path / "missing")


def test_what_was_gathered_may_be_released_before_it_is_written(tmp_path: Path) -> None:
    buffer = torch.empty(8)

    def gathered():
        for i in range(5):
            yield f"t{i}", buffer.fill_(i)

    path = checkpoint_writer.save(tmp_path, 1, tensors={"optimizer": gathered()}, state={}, write_model=None, keep=1)
    assert [float(t[0]) for t in checkpoint.load(path).tensors["optimizer"].values()] == [0.0, 1.0, 2.0, 3.0, 4.0]


# optimizer


def make_backend(**trainer: Any) -> Replicated:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
    settings = TrainerConfig(learning_rate=1e-2, weight_decay=0.1, **trainer)
    return Replicated(SimpleNamespace(model=model), settings, World())


def train(backend: Replicated, first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        loss = (backend.model(x) ** 2).mean() + backend.model(x).sum() * 0.01
        backend.backward(loss, last=True)
        backend.step(learning_rate=1e-2 / (step + 1))
        losses.append(loss.item())
    return losses


def test_adamw_continues_bit_for_bit(tmp_path: Path) -> None:
    backend = make_backend()
    train(backend, 0, 3)
    weights = copy.deepcopy(backend.model.state_dict())
    path = checkpoint_writer.save(
        tmp_path, 3, tensors={"optimizer": backend.state()}, state={}, write_model=None, keep=1
    )
    expected = train(backend, 3, 5)

    resumed = make_backend()
    resumed.model.load_state_dict(weights)
    saved = checkpoint.load(path).tensors["optimizer"]
    before = {name: tensor.clone() for name, tensor in saved.items()}
    resumed.load_state(saved)
    assert train(resumed, 3, 5) == expected
    for name, weight in backend.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    old, new = dict(backend.state()), dict(resumed.state())
    assert old.keys() == new.keys() == before.keys()
    assert all(torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype for name in old)
    assert [float(new[name]) for name in new if name.endswith("/step")] == [8.0] * 6
    # training does not write into the loaded tensors
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())


def test_an_optimizer_that_never_stepped_is_saved_too(tmp_path: Path) -> None:
    backend = make_backend()
    path = checkpoint_writer.save(
        tmp_path, 1, tensors={"optimizer": backend.state()}, state={}, write_model=None, keep=1
    )
    backend.load_state(checkpoint.load(path).tensors["optimizer"])
    assert len(backend.optimizer.state) == 0


def test_an_optimizer_of_another_model_is_refused() -> None:
    backend = make_backend()
    with pytest.raises(PactError, match=r"a state of '3\.weight', which the model does not train"):
        backend.load_state({"3.weight/exp_avg": torch.zeros(2)})
    with pytest.raises(PactError, match=r"'0.weight' has the shape \(5, 6\), its state \(5, 7\)"):
        backend.load_state({"0.weight/exp_avg": torch.zeros(5, 7)})


# generators


def draws() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.randn(()).item()]


def test_generators_continue_where_they_were(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()  # gauss and randn now hold a spare number each
    state, tensors = rng.rng_state()
    path = checkpoint_writer.save(tmp_path, 1, tensors={"rng": tensors}, state={"rng": state}, write_model=None, keep=1)
    expected = [draws() for _ in range(3)]
    saved = checkpoint.load(path)
    rng.set_rng_state(saved.state["rng"], saved.tensors["rng"])
    assert [draws() for _ in range(3)] == expected
    assert [draws() for _ in range(3)] != expected


# metrics


@pytest.mark.parametrize("tail", [b'{"step": 4, "loss": 1', b'{"step": 4, "loss": 1}\n{"st', b"\0\0\xff", b""])
def test_metrics_are_cut_back_to_their_size_at_the_checkpoint(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    head = b'{"step": 3}\n{"step": 3}\n'
    path.write_bytes(head + tail)
    checkpoint.rewind_metrics(path, len(head))
    assert path.read_bytes() == head
    checkpoint.rewind_metrics(path, 0)
    assert path.read_bytes() == b""


def test_metrics_that_lost_bytes_keep_their_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')
    checkpoint.rewind_metrics(path, 1000)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_missing_metrics_stay_missing(tmp_path: Path) -> None:
    checkpoint.rewind_metrics(tmp_path / "metrics.jsonl", 3)
    assert os.listdir(tmp_path) == []
