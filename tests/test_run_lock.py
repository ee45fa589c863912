"""One process trains in a run directory; another one gets an error that names it, at any moment of its start."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import yaml

from pact_fast.errors import PactError
from pact_fast.train import run_lock
from pact_fast.train.run_lock import LOCK, RunLock
from tests.support.runs import TINY_RUN, RunProcess, metrics, saved

pytestmark = pytest.mark.hostile


def foreign(run: Path, beat: int = 0) -> None:
    """The lock file of a process on another machine."""
    run.mkdir(exist_ok=True)
    record = {"host": "node7", "pid": 4711, "boot": "other", "started": "yesterday", "beat": beat, "id": "a"}
    (run / LOCK).write_text(json.dumps(record))


def test_a_second_start_is_told_who_trains_there(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(PactError) as caught:
        RunLock(tmp_path)
    assert f"is in use by process {os.getpid()} on {socket.gethostname()}, started 20" in str(caught.value)
    assert "wait until it has ended, or stop it" in str(caught.value)
    first.check()
    first.release()
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_only_the_lock_needed_is_removed(tmp_path):
    RunLock(tmp_path / "a/run").release()
    assert not (tmp_path / "a/run").exists()
    lock = RunLock(tmp_path / "b")
    (tmp_path / "b/metrics.jsonl").touch()
    lock.release()
    assert os.listdir(tmp_path / "b") == ["metrics.jsonl"]


def test_a_lock_that_nobody_holds_any_more_ends_with_its_object(tmp_path):
    lock = RunLock(tmp_path)
    del lock
    RunLock(tmp_path).release()


@pytest.mark.slow
@pytest.mark.parametrize("child_lives", [False, True])
def test_sigkill_releases_the_lock_also_while_a_child_lives_on(tmp_path, child_lives):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock = RunLock(tmp_path)  # noqa: F841
        child = os.fork() if child_lives else 0
        if child or not child_lives:
            os.write(writer, b"%d" % child + b"\n")
        time.sleep(60)
        os._exit(0)
    child = int(os.read(reader, 20))
    with pytest.raises(PactError, match=f"process {pid} "):
        RunLock(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    started = time.monotonic()
    RunLock(tmp_path, pytest.fail).release()  # at once, without a word
    assert time.monotonic() - started < run_lock.HEARTBEAT_TIMEOUT / 2
    if child:
        os.kill(child, signal.SIGKILL)


def test_a_lock_of_another_host_is_taken_over_once_its_heartbeat_has_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_TIMEOUT", 0.3)
    foreign(tmp_path)
    notes: list[str] = []
    lock = RunLock(tmp_path, notes.append)
    assert len(notes) == 1 and "process 4711 on node7" in notes[0] and "waiting" in notes[0]
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    foreign(tmp_path, beat=5)  # it was not dead
    with pytest.raises(PactError, match="was taken over by process 4711 on node7"):
        lock.check()
    lock.release()


def test_a_heartbeat_from_another_host_keeps_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_TIMEOUT", 5.0)
    foreign(tmp_path)
    timer = threading.Timer(0.2, foreign, (tmp_path, 1))
    timer.start()
    with pytest.raises(PactError, match="is in use by process 4711 on node7"):
        RunLock(tmp_path)
    timer.join()
    assert json.loads((tmp_path / LOCK).read_text())["beat"] == 1


def test_heartbeats_lock_where_the_file_system_cannot(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "HEARTBEAT_TIMEOUT", 3.0)
    first = RunLock(tmp_path)
    with pytest.raises(PactError, match=f"is in use by process {os.getpid()} "):
        RunLock(tmp_path)
    first.release()


@pytest.mark.parametrize("kind", ["symlink", "dangling", "folder", "pipe", "garbage"])
def test_a_lock_file_that_is_none_is_never_written_through(tmp_path, kind):
    run, other = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    if kind in ("symlink", "dangling"):
        (run / LOCK).symlink_to(other)
        if kind == "symlink":
            other.write_text("precious")
    elif kind == "folder":
        (run / LOCK).mkdir()
    elif kind == "pipe":
        os.mkfifo(run / LOCK)
    else:
        (run / LOCK).write_bytes(b'{"pid": \x1b[2J' + b"[" * 5000)
    if kind == "garbage":
        RunLock(run).release()
    else:
        with pytest.raises(PactError, match=r"run\.lock is not a file; remove it|cannot lock"):
            RunLock(run)
    assert (other.read_text() == "precious") if kind == "symlink" else not other.exists()


# whole runs


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[list[str], dict[int, list[dict]]]:
    """A recipe, and the metrics of an undisturbed run by its seed."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY_RUN))
    recipe = [str(folder / "tiny.yaml"), "trainer.max_steps=2", "trainer.save_total_limit=9"]
    runs = [RunProcess(folder / f"run{seed}", f"seed={seed}", recipe=recipe) for seed in (0, 1)]
    for run in runs:
        run.succeed()
    return recipe, {seed: metrics(folder / f"run{seed}") for seed in (0, 1)}


@pytest.mark.slow
@pytest.mark.chaos
def test_two_runs_on_one_directory_never_mix(alone, tmp_path):
    """Twenty pairs, the second at a random moment of the first: one trains, the other says why it does not."""
    recipe, expected = alone
    rng = random.Random(os.environ.get("PACT_KILL_SEED", "3"))
    in_use = 0
    for number in range(20):
        run = tmp_path / f"run{number}"
        first = RunProcess(run, "seed=0", recipe=recipe, log=tmp_path / f"{number}a.log")
        time.sleep(rng.choice([0.0, rng.uniform(0, 0.1), rng.uniform(0, 2.0)]))
        second = RunProcess(run, "seed=1", recipe=recipe, log=tmp_path / f"{number}b.log")
        codes = first.exit_code(), second.exit_code()
        assert sorted(codes) == [0, 2], first.output() + second.output()
        seed = codes.index(0)
        winner, loser = (first, second) if seed == 0 else (second, first)
        error = loser.error()
        if f"is in use by process {winner.pid} on {socket.gethostname()}" in error:
            in_use += 1
        else:  # it started after the end
            assert "cannot be resumed with other settings: seed" in error
        assert metrics(run) == expected[seed]
        assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == seed
        assert json.loads((run / "summary.json").read_text())["seed"] == seed
        assert saved(run) == [1, 2]
        assert not [path for path in run.iterdir() if path.name.startswith(".") or path.name == LOCK]
    assert in_use >= 10
