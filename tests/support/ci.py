"""Options of pytest for .ci/run: a second chance for tests that measure time, and durations as JSON."""

from __future__ import annotations

import json
import multiprocessing.forkserver
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

AGAIN = "second chance"  # category of a test that failed beside others and passed alone


# Files of few tests that take long. A worker gets whole files; one of these at the end would keep one worker busy alone.
LONGEST = (
    "test_memory_estimate", "test_distributed_run", "test_distributed", "test_build", "test_chaos", "test_run_lock",
    "test_smollm2", "test_ftrl_run", "test_head_precision", "test_update_step", "test_benchmarks", "test_triton_interpreter",
    "test_ops", "test_tree_models", "test_triton_compile", "test_resume", "test_plan", "test_chaos_files", "test_endings",
    "test_sandbox_leftovers", "test_wheel",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pact_fast")
    group.addoption(
        "--second-chance", action="store_true",
        help="after all other tests, run those again, alone, that failed and are marked timing",
    )  # fmt: skip
    group.addoption("--durations-json", type=Path, metavar="PATH", help="write the seconds of every test there")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.user_properties.append(("cpu", -cpu_seconds()))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    if call.when == "teardown":
        item.user_properties[0] = ("cpu", item.user_properties[0][1] + cpu_seconds())
    return (yield)


def cpu_seconds() -> float:
    """CPU seconds so far of this process, of the children it has waited for, and of those of its fork server."""
    server = getattr(multiprocessing.forkserver._forkserver, "_forkserver_pid", None)
    forked = 0.0
    if server is not None and Path(f"/proc/{server}/stat").exists():
        ticks = Path(f"/proc/{server}/stat").read_text().rsplit(")", 1)[1].split()[11:15]
        forked = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return sum(os.times()[:4]) + forked


@pytest.hookimpl(trylast=True)  # once the workers of pytest-xdist have ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput"):
        return
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if path := config.getoption("durations_json"):
        write_durations(reporter.stats, path)
    if config.getoption("second_chance"):
        run_timing_tests_again(session, reporter.stats)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if reports := terminalreporter.stats.get(AGAIN):
        terminalreporter.section("marked timing, failed beside other tests and passed alone")
        for report in reports:
            reason = getattr(report.longrepr, "reprcrash", None)
            terminalreporter.line(f"{report.nodeid}: {reason.message if reason else report.longrepr}"[:300])


def run_timing_tests_again(session: pytest.Session, stats: dict[str, list[Any]]) -> None:
    """Failures become `AGAIN` where the test passes in a process of its own; all others stay failures."""
    passed = {
        report.nodeid
        for report in stats.get("failed", [])
        if "timing" in report.keywords and _passes_alone(report.nodeid, session.config.rootpath)
    }
    if not passed:
        return
    failed = stats.pop("failed")
    stats[AGAIN] = [report for report in failed if report.nodeid in passed]
    if left := [report for report in failed if report.nodeid not in passed]:
        stats["failed"] = left
    elif "error" not in stats and session.exitstatus == pytest.ExitCode.TESTS_FAILED:
        session.exitstatus = pytest.ExitCode.OK


def _passes_alone(nodeid: str, root: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", nodeid]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(f"\n{nodeid} failed alone, too:\n{done.stdout[-5000:]}")
    return done.returncode == 0


def write_durations(stats: dict[str, list[Any]], path: Path) -> None:
    """Seconds of every test and file, setup and teardown included, longest first.

    "tests" and "files" are wall-clock time, which depends on what else runs; "cpu" is CPU time of the tests, with that
    of the processes they started.
    """
    tests: Counter[str] = Counter()
    files: Counter[str] = Counter()
    cpu: Counter[str] = Counter()
    for report in (report for reports in stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            tests[report.nodeid] += report.duration
            files[report.nodeid.split("::")[0]] += report.duration
            cpu[report.nodeid] += dict(report.user_properties).get("cpu", 0.0) if report.when == "teardown" else 0.0
    ordered = {"files": dict(files.most_common()), "tests": dict(tests.most_common()), "cpu": dict(cpu.most_common())}
    rounded = {kind: {name: round(seconds, 3) for name, seconds in found.items()} for kind, found in ordered.items()}
    path.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
