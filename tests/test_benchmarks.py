"""The benchmarks run at small sizes: every method has a row or a reason, and a wrong kernel is a failure."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import (
    correctness,
    decoding,
    evaluations,
    gpu_suite,
    harness,
    head,
    head_methods,
    head_problem,
    hosts,
    measure,
    quickstart,
    weights_fingerprint,
)
from pact_fast.cli.main import main as pact_fast_main
from tests.support.processes import ForkedModule

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def arguments(" in path.read_text())

TINY = ["--device", "cpu", "--shapes", "64x32x515", "--rounds", "2"]


def run_head(tmp_path: Path, *options: str) -> tuple[int, dict]:
    out = tmp_path / "head.json"
    status = head.main([*TINY, "--out", str(out), *options])
    return status, json.loads(out.read_text())


@pytest.mark.slow
def test_head_compares_every_method_or_says_why_not(tmp_path, monkeypatch, capsys):
    for name, method in head_methods.METHODS.items():
        if method.compiled:
            slow = dataclasses.replace(method, reason=lambda problem: "compiles for too long")
            monkeypatch.setitem(head_methods.METHODS, name, slow)
    options = ("--dtypes", "bfloat16", "float32", "--fractions", "0.5", "--no-memory", "--date", "2026-01-02")
    status, report = run_head(tmp_path, *options)
    assert status == 0 and report["failures"] == []
    assert report["date"] == "2026-01-02" and report["versions"]["torch"] and report["machine"]["threads"]
    printed = capsys.readouterr().out
    for case in report["cases"]:
        rows = {row["method"]: row for row in case["rows"]}
        assert list(rows) == list(head_methods.METHODS)
        assert all(f"| {name} " in printed for name in rows)
        for name, row in rows.items():
            if row["status"] != "ok":
                assert len(row["status"]) > 5
                continue
            for column in ("forward_ms", "both_ms"):
                assert len(row[column]["rounds"]) in (2, harness.SLOW_ROUNDS)
                assert row[column]["median"] > 0 and row[column]["ratio_to_gemms"] > 0
            if row["kind"] != "floor":
                assert all(math.isfinite(error) for error in row["errors"].values()), name
        assert rows["gemms"]["both_ms"]["ratio_to_gemms"] == 1.0
        ours = rows["pact torch"]["errors"]
        assert ours["logprob_max"] < 1e-5 and ours["dx"] < 5e-3 and ours["dw"] < 5e-3
        assert case["verdict"]["ours"].startswith("pact") and case["verdict"]["ratio_to_fastest_peer"] > 0


def test_inactive_rows_are_ignored_by_heads_that_know_only_cross_entropy():
    problem = head_problem.make_problem((64, 32, 515), head.torch.float32, head.torch.device("cpu"), 0.25)
    assert int(problem.active.sum()) == 16
    assert (problem.labels == head_problem.IGNORE).sum() == 48
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
    monkeypatch.setitem(
        head_methods.METHODS, "pact torch", dataclasses.replace(head_methods.METHODS["pact torch"], **broken)
    )


@pytest.mark.slow
def test_a_wrong_log_prob_of_ours_is_an_exit_status(tmp_path, monkeypatch, capsys):
    right = head_methods.METHODS["pact torch"].forward
    break_method(monkeypatch, forward=lambda problem: right(problem) + 0.01)
    options = ("--dtypes", "bfloat16", "--fractions", "1", "--no-memory", "--methods", "gemms", "eager", "pact torch")
    status, report = run_head(tmp_path, *options)
    assert status == 1
    assert any("pact torch: logprob_rms 0.01" in failure for failure in report["failures"])
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_gradient_of_ours_is_an_exit_status(tmp_path, monkeypatch):
    right = head_methods.METHODS["pact torch"].step

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
    monkeypatch.setitem(
        head_methods.METHODS, "trl chunked", dataclasses.replace(head_methods.METHODS["verl's formula"], step=fail)
    )
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


def test_times_are_those_of_the_clock_that_is_given():
    now = [0.0]

    def work():
        now[0] += 0.25

    times = measure.paired_rounds({"a": work}, {"a": 2}, head.torch.device("cpu"), clock=lambda: now[0])
    assert times == {"a": [250.0, 250.0]}


def test_correctness_flags_a_kernel_that_is_wrong(monkeypatch, capsys):
    case = correctness.KernelCase("odd V", 40, 16, 131, "float32")
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
def test_fingerprints_are_checked_before_they_are_timed(tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.json"
    small = ["--device", "cpu", "--megabytes", "1", "--rounds", "1", "--commit", "abc", "--out", str(out)]

    def wrong() -> list[str]:
        status = weights_fingerprint.main(small)
        report = json.loads(out.read_text())
        assert {"blockwise", "torch"} <= {row["method"] for row in report["cases"][0]["rows"]}
        failures = [line for case in report["cases"] for line in case["failures"]]
        assert status == (1 if failures else 0)
        return [line for line in failures if "times as fast" not in line]  # this small, it may be slower

    assert wrong() == []
    right = weights_fingerprint.fingerprint
    monkeypatch.setattr(weights_fingerprint, "fingerprint", lambda *args, **kwargs: right(*args, **kwargs) & ~0xFFF | 7)
    assert "the parts do not add up" in wrong()
    monkeypatch.setattr(weights_fingerprint, "fingerprint", lambda tensor, *_, **__: tensor.numel())
    assert "a flipped bit does not show in torch" in wrong()
    assert "| blockwise |" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_suite_runs_dry_without_a_gpu(tmp_path, monkeypatch):
    names = {name: getattr(subprocess, name) for name in ("STDOUT", "TimeoutExpired")}
    monkeypatch.setattr(gpu_suite, "subprocess", SimpleNamespace(Popen=ForkedModule, **names))
    out = tmp_path / "suite.json"
    names = ("correctness", "head", "recurrences", "softmax")
    status = gpu_suite.main(["--device", "cpu", "--only", *names, "--out", str(out)])
    report = json.loads(out.read_text())
    states = {name: section["status"] for name, section in report["sections"].items()}
    assert status == 0 and states == dict.fromkeys(names, "passed"), report
    assert report["sections"]["head"]["results"]["cases"]
    assert len(report["sections"]["correctness"]["results"]["results"]) == 2 * len(correctness.CASES)
    assert report["sections"]["softmax"]["results"]["shapes"][0]["profiler"]


@pytest.mark.slow
def test_gpu_suite_keeps_what_a_section_has_written_when_its_time_is_up(tmp_path, monkeypatch):
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('{\"half\": 1}'); time.sleep(60)"
    section = gpu_suite.Section("sleeps", 3, lambda device, out: [sys.executable, "-c", code, str(out)])
    absent = gpu_suite.Section("absent", 1, lambda device, out: [], needs=("no_such_module",))
    monkeypatch.setattr(gpu_suite, "SECTIONS", {"sleeps": section, "absent": absent})
    out = tmp_path / "suite.json"
    assert gpu_suite.main(["--device", "cpu", "--only", "sleeps", "absent", "--out", str(out)]) == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["sleeps"]["status"] == "out of time" and sections["sleeps"]["results"] == {"half": 1}
    assert sections["absent"] == {"status": "not possible", "reason": "not installed: no_such_module"}


def test_gpu_suite_fits_eight_minutes_and_says_so_when_there_is_no_gpu(capsys):
    assert sum(section.seconds for section in gpu_suite.SECTIONS.values()) <= gpu_suite.LIMIT < 8 * 60
    assert all((ROOT / test).is_file() for test in (*gpu_suite.TESTS, *gpu_suite.RECURRENCES))
    assert gpu_suite.main(["--list"]) == 0
    if not head.torch.cuda.is_available():
        assert gpu_suite.main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def documented_commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every benchmark command in the docs; a backslash continues a line."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for command in re.findall(r"python (?:-m )?benchmarks[./][^`|&;\n]+", text):
            yield page.name, command.rstrip()


@pytest.mark.parametrize(("page", "command"), list(documented_commands()), ids=lambda value: value)
def test_command_in_the_docs_parses(page, command):
    words = shlex.split(command)[1:]
    target, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    name = target.removeprefix("benchmarks").removesuffix(".py").strip("./")
    assert name in COMMANDS, f"{page}: {target}"
    importlib.import_module(f"benchmarks.{name}").arguments(arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_docstring_and_has_the_common_options(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        module.arguments(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"usage: python -m benchmarks.{name}") and module.__doc__.splitlines()[0] in text
    assert {"--out", "--date", "--commit"} <= set(re.findall(r"--\w+", text))


@pytest.mark.slow
def test_tool_calls_are_timed_with_pauses_and_without(tmp_path):
    out = tmp_path / "sandbox.json"
    assert importlib.import_module("benchmarks.sandbox").main(["--rounds", "2", "--out", str(out)]) == 0
    pauses = json.loads(out.read_text())["pauses"]
    assert len(pauses) == 2 and all(len(pause["ms"]["this checkout"]) == 2 for pause in pauses.values())


@pytest.mark.slow
def test_a_benchmark_started_as_a_file_is_the_module(tmp_path, monkeypatch):
    """From any directory, without the checkout on the import path."""
    path = ROOT / "benchmarks" / "head.py"
    monkeypatch.chdir(tmp_path)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, str(path), "--help"], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m benchmarks.head")


def test_result_files_say_where_they_come_from(tmp_path):
    out = tmp_path / "report.json"
    args = head.arguments(["--date", "2026-01-02", "--commit", "abc", "--out", str(out)])
    harness.write_report(harness.new_report("head", args, rounds=3), args.out)
    report = json.loads(out.read_text())
    assert (report["benchmark"], report["date"], report["commit"], report["rounds"]) == ("head", "2026-01-02", "abc", 3)
    assert report["versions"]["torch"] and report["machine"]["threads"]


@pytest.mark.slow
def test_quickstart_results_are_stamped(tmp_path, monkeypatch):
    rate = {"mean": 0.9, "low": 0.8, "high": 1.0}
    base = {"mean": 0.2, "low": 0.1, "high": 0.3}
    summary = {
        "base_success": base, "success": rate, "base_greedy": base, "greedy": rate, "wall_seconds": 60,
        "cpu_seconds": 100, "peak_kib": 1 << 20, "untrained": None,
    }  # fmt: skip
    monkeypatch.setattr(quickstart, "train", lambda seed, *rest: summary | {"seed": seed})
    out = tmp_path / "quickstart.json"
    assert quickstart.main(["--seeds", "0", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1]
    assert report["date"] and report["versions"]["torch"] and report["machine"]["cpu"]

    def status(*options: str, **changes) -> int:
        monkeypatch.setattr(quickstart, "train", lambda seed, *rest: summary | {"seed": seed, **changes})
        return quickstart.main(["--seeds", "0", *options])

    assert status(wall_seconds=601) == status(peak_kib=8_000_000) == status(success=base) == 1
    assert status(greedy={**base, "mean": 0.1}) == 1
    untrained = {"sampled": {"success": 0.0}}
    assert status("--recipe", "smollm2-cpu", wall_seconds=601, untrained=untrained) == 0


@pytest.mark.slow
def test_decoding_compares_the_engine_with_generate_on_the_same_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "subprocess", ForkedModule)
    out = tmp_path / "decoding.json"
    options = ["--tiny", "--batches", "2", "--prompt", "7", "--tokens", "3", "--rounds", "2", "--prefill", "2x50"]
    methods = ["engine", "generate", "generate static"]
    assert decoding.main([*options, "--methods", *methods, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    for case in report["cases"]:
        assert list(case["rows"]) == methods and case["floor_ms"] > 0
        assert case["logprob_difference"] < decoding.TOLERANCE[case["case"]["dtype"]]
        assert all(len(row["rounds_step_cpu_ms"]) == 2 for row in case["rows"].values())
        assert case["rows"]["engine"]["time_to_engine"] == 1.0
    assert [found["cache"] for found in report["prefill"]] == [2 * 50 * 2 * 2 * 16 * 2 * size for size in (4, 2)]
    assert "time/engine" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hosts_compares_the_step_of_trl_with_every_mode_and_finds_a_wrong_gradient(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="install trl for this benchmark")
    small = ["--vocab", "97", "--width", "128", "--prompt-tokens", "9", "--completion-tokens", "5", "--layers", "1"]
    command = [*small, "--rounds", "1", "--no-memory", "--out", str(tmp_path / "hosts.json")]
    assert hosts.main(command) == 0
    [case] = json.loads((tmp_path / "hosts.json").read_text())["cases"]
    assert case["methods"].keys() == set(hosts.METHODS)
    assert max(method["gradient"] for method in case["methods"].values()) < hosts.LIMIT
    assert case["methods"]["head"]["logprob_error"] < 1e-5
    monkeypatch.setattr(
        hosts.Step, "gradients", lambda step: [p.grad + 0.1 * len(step.method) for p in parameters(step)]
    )
    assert hosts.main(command) == 1


def parameters(step):
    return list(step.trainer.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("differs", [False, True])
def test_evaluations_are_compared_byte_by_byte(tmp_path, monkeypatch, capsys, differs):
    pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval")
    runs = []

    def in_process(command):
        assert pact_fast_main(command) == 0
        runs.append(Path(command[-1]))
        if differs and len(runs) == 2:
            path = next((runs[-1] / "rollouts").iterdir())
            path.write_text(path.read_text().replace("0.", "1.", 1))
        return {"seconds": 1000.0 if differs else 1.0, "cpu_seconds": 1.0, "peak_mib": 1}

    monkeypatch.setattr(evaluations, "timed", in_process)
    out = tmp_path / "out.json"
    options = ["--benchmarks", "bfcl", "--limit", "1", "--out", str(out), "rollout.max_turn_tokens=4"]
    assert evaluations.main(options) == int(differs)
    (case,) = json.loads(out.read_text())["cases"]
    assert case["tasks"] == 1 and case["tokens"] > 0 and case["identical"] is not differs
    printed = capsys.readouterr().out
    assert not differs or ("two runs differ" in printed and "1000.0 s" in printed)
