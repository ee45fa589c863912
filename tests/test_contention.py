"""The benchmark of a busy machine: its verdicts, and a run at toy size."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contention
from pact_fast.openmp import USERS_CHOICE


def rounds(*given: tuple[float, float, float]) -> list[dict[str, Any]]:
    """From (quiet seconds, busy seconds, cores that others took in the quiet half)."""
    return [
        {"quiet": {"seconds": quiet, "others": others}, "busy": {"seconds": busy, "others": 0.0}}
        for quiet, busy, others in given
    ]


def test_factors_are_taken_within_a_round_and_disturbed_rounds_do_not_count():
    row = contention.summary(rounds((1, 1.5, 0), (10, 19, 0.05), (1, 1.8, 0), (1, 9, 0.3)))
    assert row["factor"] == 1.8 and row["calm_rounds"] == 3
    assert row["factor_of_all_rounds"] == pytest.approx(1.85)
    assert row["others"] == {"median": 0.025, "largest": 0.3}


def test_there_is_no_verdict_on_a_machine_that_is_not_quiet():
    row = contention.summary(rounds(*[(1, 1.5, 0.4)] * 9))
    assert row["factor"] is None
    results = [{"waiting": "package", "rows": {"head": row}}]
    (line,) = contention.failures(results)
    assert line.startswith("head: no verdict, other processes took 0.4 cores")
    assert "(1.50, disturbed)" in contention.table(results)


def test_only_the_packages_own_setting_has_to_pass():
    slow, fast = (contention.summary(rounds(*[(1, busy, 0)] * 3)) for busy in (2.5, 2.0))
    assert contention.failures([{"waiting": "libgomp", "rows": {"head": slow}}]) == []
    assert contention.failures([{"waiting": "package", "rows": {"head": fast}}]) == []
    assert contention.failures([{"waiting": "package", "rows": {"head": slow}}]) == [
        "head: 2.50 times its quiet time, at most 2"
    ]


def test_every_way_to_wait_is_an_environment():
    given = {"OMP_WAIT_POLICY": "active", "HOME": "/"}
    found = {way: contention.waiting_environment(way, given) for way in ("package", "libgomp", "passive", "70")}
    assert all(environment.pop("HOME") == "/" for environment in found.values())
    assert found == {
        "package": {},
        "libgomp": {"GOMP_SPINCOUNT": "300000"},
        "passive": {"OMP_WAIT_POLICY": "passive"},
        "70": {"GOMP_SPINCOUNT": "70"},
    }
    with pytest.raises(SystemExit):
        contention.arguments(["--waiting", "patiently"])


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="CPU times are read from /proc")
def test_busy_processes_compute_only_while_they_are_told_to():
    busy = contention.BusyProcesses(1)
    try:
        with busy.running():
            deadline = time.monotonic() + 30
            while busy.seconds() < 0.1 and time.monotonic() < deadline:
                time.sleep(0.05)
        used = busy.seconds()
        assert used >= 0.1
        seen = contention.observed(lambda: time.sleep(0.3), busy)
        assert busy.seconds() - used <= 0.05 and seen["seconds"] >= 0.3 and seen["others"] >= 0
    finally:
        busy.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="CPU times are read from /proc")
def test_a_quick_run_measures_all_work(tmp_path, monkeypatch, capsys):
    out = tmp_path / "contention.json"
    for name in USERS_CHOICE:
        monkeypatch.delenv(name, raising=False)
    assert contention.main(["--quick", "--out", str(out)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["spin_count"] == "2000" and result["threads"] >= 1
    assert set(result["rows"]) == {"rollouts", "head", "update"}
    assert all(row["quiet_s"] > 0 and row["factor_of_all_rounds"] > 0 for row in result["rows"].values())
    assert "| rollouts | package |" in capsys.readouterr().out
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if p.parent.name != str(os.getpid()) and is_busy(p)]
    assert not left


def is_busy(path: Path) -> bool:
    try:
        return contention.BUSY.encode() in path.read_bytes() and os.stat(path).st_uid == os.getuid()
    except OSError:
        return False
