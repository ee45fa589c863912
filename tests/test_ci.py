"""The second chance of timing tests: it forgives them once, nothing else, and says so before pytest's closing line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment

pytestmark = pytest.mark.slow
CONFTEST = "from tests.support.ci import pytest_addoption, pytest_sessionfinish, pytest_terminal_summary"
FLAKY = """
import pathlib, pytest

@pytest.mark.{marker}
def test_flaky():
    mark = pathlib.Path(__file__).with_name("seen")
    first = not mark.exists()
    {touch}
    assert not first

def test_fine(): pass
"""


@pytest.mark.parametrize(
    ("marker", "passes_later", "status"), [("timing", True, 0), ("timing", False, 1), ("slow", True, 1)]
)
def test_only_a_timing_test_that_passes_alone_is_forgiven(marker, passes_later, status, tmp_path):
    text = FLAKY.format(marker=marker, touch="mark.touch()" if passes_later else "")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    timing\n    slow\n")
    command = [sys.executable, "-m", "pytest", "--second-chance", "--durations-json", str(tmp_path / "durations.json")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    *rest, closing = done.stdout.splitlines()
    if status == 0:
        assert any(line.startswith("test_it.py::test_flaky: ") for line in rest)
        assert "1 passed" in closing and "1 second chance" in closing and "failed" not in closing
    else:
        assert "1 failed" in closing and "second chance" not in closing
    durations = json.loads(Path(tmp_path / "durations.json").read_text())
    assert set(durations["tests"]) == {"test_it.py::test_flaky", "test_it.py::test_fine"}
