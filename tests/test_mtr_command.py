"""`pact-fast data mtr`: the files, and that a killed command gives the same ones."""

import json
import os
import signal
import time

import pytest

from pact_fast.cli.main import main
from pact_fast.data.readers import read_tasks
from pact_fast.errors import PactError
from pact_fast.synthesis.mtr import pipeline
from pact_fast.synthesis.mtr.pipeline import Settings, make_dataset, power_law_r2
from tests.support.qa_data import MUSIQUE, WIKI


@pytest.fixture
def rows(tmp_path):
    """Forty rows; every fifth has no decomposition, one cannot be read."""
    path = tmp_path / "rows.jsonl"
    lines = []
    for index in range(40):
        row = {**(WIKI if index % 2 else MUSIQUE).to_json(), "id": f"r{index}"}
        if index % 5 == 0:
            row = {key: row[key] for key in ("id", "question", "answers")}
        lines.append(json.dumps(row))
    path.write_text("\n".join([*lines, '{"question": 3}', ""]))
    return path


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_writes_tasks_reasons_tools_and_a_report(rows, tmp_path, capsys):
    assert main(["data", "mtr", str(rows), "-o", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    assert set(files(out)) == {"train.jsonl", "rejected.jsonl", "tools.json", "report.html", "manifest.json"}
    tasks = read_tasks(out / "train.jsonl", environments=["simulated"])
    assert len(tasks) == 32 and all(task.expert.answer for task in tasks)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [r["reasons"] for r in rejected] == [["no_plan"]] * 8 + [["unreadable"]]
    tools = json.loads((out / "tools.json").read_text())
    assert tools["tools"][0]["tasks"] == 32 and tools["merged"] == 2 * 16
    page = (out / "report.html").read_text()
    assert "78.0 %" in page and "Shawn Levy" in page and "<script" not in page
    assert "32 of 41 rows" in capsys.readouterr().out


def test_a_command_that_is_given_again_changes_nothing_and_one_with_other_settings_is_refused(rows, tmp_path):
    out = tmp_path / "out"
    make_dataset(rows, out, Settings())
    before = files(out)
    make_dataset(rows, out, Settings())
    assert files(out) == before
    with pytest.raises(PactError, match="other settings"):
        make_dataset(rows, out, Settings(max_turns=3))


@pytest.mark.parametrize("stop", [0, 1, 17, 40])
@pytest.mark.parametrize("cut", [0, 7])
def test_an_interrupted_command_gives_the_same_files(rows, tmp_path, stop, cut):
    make_dataset(rows, tmp_path / "whole", Settings())

    class Killed(BaseException):
        pass

    def kill(done, kept):
        if done > stop:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        make_dataset(rows, out, Settings(), kill)
    journal = out / pipeline.JOURNAL
    journal.write_bytes(journal.read_bytes()[: -cut or None])  # the last record is incomplete
    make_dataset(rows, out, Settings())
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.slow
def test_kill_9_at_any_moment_gives_the_same_files(rows, tmp_path):
    make_dataset(rows, tmp_path / "whole", Settings())
    out, kills = tmp_path / "out", 0
    for delay in (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 5.0):
        child = os.fork()
        if child == 0:
            make_dataset(rows, out, Settings())
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] != 0
    make_dataset(rows, out, Settings())
    assert kills and files(out) == files(tmp_path / "whole")


def test_texts_of_rows_are_escaped_in_the_report(tmp_path):
    row = {**WIKI.to_json(), "id": "<img src=x onerror=alert(1)>"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    make_dataset(tmp_path / "rows.jsonl", tmp_path / "out", Settings())
    assert "<img" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("arguments", [["--fault", "timeout"], ["--fault", "slow=1"], ["--max-rows", "0"]])
def test_wrong_options_are_errors(rows, tmp_path, arguments, capsys):
    assert main(["data", "mtr", str(rows), "-o", str(tmp_path / "out"), *arguments]) == 2
    assert "\nerror: " in "\n" + capsys.readouterr().err


def test_the_fit_of_a_power_law():
    assert power_law_r2([1000 // rank for rank in range(1, 30)]) == pytest.approx(1.0, abs=0.01)
    assert power_law_r2([5, 5, 5]) is None and power_law_r2([3]) is None
