"""`pact-fast data mtr`: the files, and that a killed command gives the same ones."""

import itertools
import json
import os
import signal
import threading
import time

import pytest

from pact_fast.cli.main import main
from pact_fast.data.readers import read_tasks
from pact_fast.envs.simulated.env import make_actor
from pact_fast.envs.simulated.world import ToolWorld
from pact_fast.errors import PactError
from pact_fast.synthesis.journal import JOURNAL
from pact_fast.synthesis.mtr import pipeline
from pact_fast.synthesis.mtr.pipeline import Settings, make_dataset, power_law_r2
from tests.support.llm_server import llm_server, said
from tests.support.qa_data import MUSIQUE, WIKI

FILES = {"train.jsonl", "tasks.jsonl", "rejected.jsonl", "tools.json", "report.html", "manifest.json"}


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
    assert set(files(out)) == FILES
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
    journal = out / JOURNAL
    journal.write_bytes(journal.read_bytes()[: -cut or None])  # the last record is incomplete
    (out / ".rejected.jsonl.a1b2c3d4.tmp").write_text("half")  # a kill while the files were written
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


@pytest.fixture
def without_plan(tmp_path):
    """Twelve rows as of HotpotQA, without a plan: every third has no passages; and one with a plan."""
    path = tmp_path / "hotpot.jsonl"
    context = [["Oslo", ["Oslo is a city.", "Ann was born in Oslo."]], ["Rome", ["Rome is old."]]]
    rows = [
        {"_id": f"h{i}", "question": f"Where was Ann {i} born?", "answer": "Oslo"}
        | ({"context": context} if i % 3 else {})
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, MUSIQUE.to_json()]))
    return path


def test_rows_without_a_plan_are_tasks_that_search_their_passages(without_plan, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "mtr", str(without_plan), "-o", str(out)]) == 0
    tasks = read_tasks(out / "tasks.jsonl", environments=["simulated"])
    assert [task.id for task in tasks] == [f"h{i}" for i in range(12) if i % 3]
    assert all([tool["function"]["name"] for tool in task.tools] == ["search"] for task in tasks)
    assert all(task.expert is None and task.columns["answers"] == ["Oslo"] for task in tasks)
    assert "8 tasks without a trace" in capsys.readouterr().out
    actor = make_actor({})
    found = actor.episode("h1", ToolWorld.from_task(tasks[0].tools, tasks[0].env_args)).call("search", {"query": "Ann"})
    assert "born in Oslo" in found


def test_a_language_model_writes_tools_for_rows_without_a_plan_and_is_asked_once(without_plan, tmp_path):
    pytest.importorskip("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")
    parameter = {"name": "person", "description": "A name.", "type": "string", "example": "Ann"}
    returned = {"name": "town", "description": "A town.", "type": "string"}
    lock = threading.Lock()

    def answer(body):
        """Every fourth answer leaks, another fourth has no name."""
        with lock:
            number = next(count)
        name = "no name" if number % 4 == 1 else "get_birthplace"
        said_by = "Born in Oslo or not." if number % 4 == 2 else "The town of a person's birth."
        tool = {"name": name, "description": said_by, "parameters": [parameter], "returns": [returned]}
        return said(json.dumps({"tools": [tool]}))

    count = itertools.count()
    with llm_server(answer) as server:
        settings = tmp_path / "llm.yaml"
        settings.write_text(f"model: m\nbase_url: {server.url}\nmax_concurrency: 3\n")
        arguments = ["data", "mtr", str(without_plan), "--llm", str(settings), "-o"]
        assert main([*arguments, str(tmp_path / "out")]) == 0
        asked = len(server.bodies)
        assert asked >= 12 and not any("Oslo" in str(body["messages"][:2]) for body in server.bodies)
        for path in (tmp_path / "out").iterdir():  # leftovers of a killed command: only the answers
            if path.is_file():
                path.rename(tmp_path / f"first-{path.name}")
        assert main([*arguments, str(tmp_path / "out")]) == 0
        assert len(server.bodies) == asked
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / f"first-{name}").read_bytes()
    tasks = read_tasks(tmp_path / "out" / "tasks.jsonl", environments=["simulated"])
    named = [[tool["function"]["name"] for tool in task.tools] for task in tasks]
    assert ["get_birthplace", "search"] in named and ["get_birthplace"] in named and ["search"] in named
    tools = json.loads((tmp_path / "out" / "tools.json").read_text())
    assert tools["rejected"]["leaks_answer"] >= 1
    assert read_tasks(tmp_path / "out" / "train.jsonl", environments=["simulated"])[0].id == MUSIQUE.id
    with pytest.raises(PactError, match="other settings"):
        make_dataset(without_plan, tmp_path / "out", Settings())


def test_records_computed_ahead_keep_their_order_and_a_failure_ends_them():
    def slow(n):
        time.sleep(0.02 * (n % 3))
        if n == 17:
            raise ValueError("17")
        return n

    assert list(pipeline.ordered(slow, range(15), 4)) == list(range(15))
    taken = []
    with pytest.raises(ValueError, match="17"):
        for n in pipeline.ordered(slow, itertools.count(), 4):
            taken.append(n)
    assert taken == list(range(17))
