"""The benchmarks run, at sizes of no interest: every method has a row or a reason, and a wrong kernel does not pass."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
import correctness  # noqa: E402
import gpu_suite  # noqa: E402
import head  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402

TINY = ["--device", "cpu", "--shapes", "64x32x515", "--rounds", "2"]


def run_head(tmp_path: Path, *options: str) -> tuple[int, dict]:
    out = tmp_path / "head.json"
    status = head.main([*TINY, "--out", str(out), *options])
    return status, json.loads(out.read_text())


@pytest.mark.slow
def test_head_compares_every_method_or_says_why_not(tmp_path, monkeypatch, capsys):
    for name, method in peers.METHODS.items():
        if method.compiled:
            slow = dataclasses.replace(method, reason=lambda problem: "compiles for too long")
            monkeypatch.setitem(peers.METHODS, name, slow)
    options = ("--dtypes", "bfloat16", "float32", "--fractions", "0.5", "--no-memory", "--date", "2026-01-02")
    status, report = run_head(tmp_path, *options)
    assert status == 0 and report["failures"] == []
    assert report["date"] == "2026-01-02" and report["versions"]["torch"] and report["machine"]["threads"]
    printed = capsys.readouterr().out
    for case in report["cases"]:
        rows = {row["method"]: row for row in case["rows"]}
        assert list(rows) == list(peers.METHODS)
        assert all(f"| {name} " in printed for name in rows)
        for name, row in rows.items():
            if row["status"] != "ok":
                assert len(row["status"]) > 5
                continue
            for column in ("forward_ms", "both_ms"):
                assert len(row[column]["rounds"]) in (2, head.SLOW_ROUNDS)
                assert row[column]["median"] > 0 and row[column]["ratio_to_gemms"] > 0
            if row["kind"] != "floor":
                assert all(math.isfinite(error) for error in row["errors"].values()), name
        assert rows["gemms"]["both_ms"]["ratio_to_gemms"] == 1.0
        ours = rows["pact torch"]["errors"]
        assert ours["logprob_max"] < 1e-5 and ours["dx"] < 5e-3 and ours["dw"] < 5e-3
        assert case["verdict"]["ours"].startswith("pact") and case["verdict"]["ratio_to_fastest_peer"] > 0


def test_inactive_rows_are_ignored_by_heads_that_know_only_cross_entropy():
    problem = peers.make_problem((64, 32, 515), head.torch.float32, head.torch.device("cpu"), 0.25)
    assert int(problem.active.sum()) == 16
    assert (problem.labels == peers.IGNORE).sum() == 48
    assert (problem.advantage[~problem.active] == 0).all() and (problem.tokens.rl_weight[~problem.active] == 0).all()
    assert problem.token_weight.sum() == pytest.approx(1.0)


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
def test_memory_on_the_cpu_is_that_of_the_call(tmp_path):
    shape = ["--shapes", "512x32x20000"]
    status, report = run_head(tmp_path, *shape, "--dtypes", "float32", "--fractions", "1", "--methods", "eager")
    assert status == 0
    row = report["cases"][0]["rows"][0]
    logits = 4 * 512 * 20_000
    if row["extra_both_bytes"] is None:
        pytest.skip("the high-water mark of resident memory cannot be reset here")
    # forward holds logits and their log-softmax; the backward pass at least those and one gradient
    assert 1.8 * logits < row["extra_forward_bytes"] < 2.5 * logits
    assert 1.8 * logits < row["extra_both_bytes"] < 5 * logits


def break_method(monkeypatch: pytest.MonkeyPatch, **broken) -> None:
    monkeypatch.setitem(peers.METHODS, "pact torch", dataclasses.replace(peers.METHODS["pact torch"], **broken))


@pytest.mark.slow
def test_a_wrong_log_prob_of_ours_is_an_exit_status(tmp_path, monkeypatch, capsys):
    right = peers.METHODS["pact torch"].forward
    break_method(monkeypatch, forward=lambda problem: right(problem) + 0.01)
    options = ("--dtypes", "bfloat16", "--fractions", "1", "--no-memory", "--methods", "gemms", "eager", "pact torch")
    status, report = run_head(tmp_path, *options)
    assert status == 1
    assert any("pact torch: logprob_rms 0.01" in failure for failure in report["failures"])
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_gradient_of_ours_is_an_exit_status(tmp_path, monkeypatch):
    right = peers.METHODS["pact torch"].step

    def step(problem):
        logprob = right(problem)
        problem.weight.grad[0] += problem.weight.grad.abs().max()
        return logprob

    break_method(monkeypatch, step=step)
    options = ("--dtypes", "float32", "--fractions", "0.5", "--no-memory", "--methods", "eager", "pact torch")
    status, report = run_head(tmp_path, *options)
    assert status == 1
    assert len(report["failures"]) == 1 and "pact torch: dw" in report["failures"][0]


@pytest.mark.slow
def test_a_failing_method_of_ours_is_an_exit_status_and_a_failing_peer_is_a_row(tmp_path, monkeypatch):
    def fail(problem, **setting):
        raise RuntimeError("no such luck")

    break_method(monkeypatch, step=fail)
    monkeypatch.setitem(peers.METHODS, "trl chunked", dataclasses.replace(peers.METHODS["verl's formula"], step=fail))
    options = ("--dtypes", "float32", "--fractions", "1", "--no-memory", "--methods", "gemms", "trl chunked")
    status, report = run_head(tmp_path, *options)
    assert status == 0 and "no such luck" in report["cases"][0]["rows"][1]["status"]
    status, report = run_head(tmp_path, *options, "pact torch")
    assert status == 1 and "no such luck" in report["failures"][0]


@pytest.mark.slow
def test_no_case_begins_after_the_time_limit(tmp_path):
    options = ("--no-memory", "--time-limit", "1e-9", "--methods", "gemms", "--dtypes", "float32")
    status, report = run_head(tmp_path, *options)
    assert status == 0 and report["cases"] == [] and len(report["not_run"]) == 3


def test_ratios_are_taken_within_a_round():
    assert measure.median_ratio([2.0, 40.0, 6.0], [1.0, 20.0, 3.0]) == 2.0
    assert measure.median_ratio([2.0, 6.0], [1.0, 2.0, 100.0]) == 2.5


def test_every_call_takes_part_in_its_rounds_in_rotating_order():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = measure.paired_rounds(calls, {"a": 3, "b": 3, "c": 2}, head.torch.device("cpu"))
    assert "".join(order) == "abc" + "bca" + "ab"
    assert {name: len(column) for name, column in times.items()} == {"a": 3, "b": 3, "c": 2}


def test_correctness_flags_a_kernel_that_is_wrong(monkeypatch, capsys):
    case = correctness.Case("odd V", 40, 16, 131, "float32")
    device = head.torch.device("cpu")
    assert correctness.check(case, "pact_loss", "torch", device)["failures"] == []
    right = correctness.run_loss

    def wrong(inputs, backend, double=False):
        values = right(inputs, backend, double)
        return values if double else values | {"dw": values["dw"] * 1.001}

    monkeypatch.setattr(correctness, "run_loss", wrong)
    failures = correctness.check(case, "pact_loss", "torch", device)["failures"]
    assert len(failures) == 1 and failures[0].startswith("dw ")


@pytest.mark.slow
def test_gpu_suite_runs_dry_without_a_gpu(tmp_path):
    out = tmp_path / "suite.json"
    status = gpu_suite.main(["--device", "cpu", "--only", "correctness", "head", "rows", "--out", str(out)])
    report = json.loads(out.read_text())
    states = {name: section["status"] for name, section in report["sections"].items()}
    assert status == 0 and states == {"correctness": "passed", "head": "passed", "rows": "passed"}, report
    assert report["sections"]["head"]["results"]["cases"]
    assert len(report["sections"]["correctness"]["results"]["results"]) == 2 * len(correctness.CASES)
    assert report["sections"]["rows"]["results"]["shapes"][0]["profiler"]


@pytest.mark.slow
def test_gpu_suite_keeps_what_a_section_has_written_when_its_time_is_up(tmp_path, monkeypatch):
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('{\"half\": 1}'); time.sleep(60)"
    section = gpu_suite.Section("sleeps", 3, lambda device, out: [sys.executable, "-c", code, str(out)])
    absent = gpu_suite.Section("absent", 1, lambda device, out: [], lambda: "not here")
    monkeypatch.setattr(gpu_suite, "SECTIONS", {"sleeps": section, "absent": absent})
    out = tmp_path / "suite.json"
    assert gpu_suite.main(["--device", "cpu", "--only", "sleeps", "absent", "--out", str(out)]) == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["sleeps"]["status"] == "out of time" and sections["sleeps"]["results"] == {"half": 1}
    assert sections["absent"] == {"status": "not possible", "reason": "not here"}


def test_gpu_suite_fits_nine_minutes_and_says_so_when_there_is_no_gpu(capsys):
    assert sum(section.seconds for section in gpu_suite.SECTIONS.values()) < 9 * 60
    assert gpu_suite.main(["--list"]) == 0
    if not head.torch.cuda.is_available():
        assert gpu_suite.main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err
