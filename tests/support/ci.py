"""Options of pytest for .ci/run: a second chance for tests that measure time, and durations as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

AGAIN = "second chance"  # category of a test that failed beside others and passed alone


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pact_fast")
    group.addoption(
        "--second-chance", action="store_true",
        help="after all other tests, run those again, alone, that failed and are marked timing",
    )  # fmt: skip
    group.addoption("--durations-json", type=Path, metavar="PATH", help="write the seconds of every test there")


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
    """{"tests": {id: seconds}, "files": {file: seconds}}, setup and teardown included, longest first."""
    tests: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for report in (report for reports in stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            tests[report.nodeid] += report.duration
            files[report.nodeid.split("::")[0]] += report.duration
    ordered = {"files": dict(files.most_common()), "tests": dict(tests.most_common())}
    rounded = {kind: {name: round(seconds, 3) for name, seconds in found.items()} for kind, found in ordered.items()}
    path.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
