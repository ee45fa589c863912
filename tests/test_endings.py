"""Ends of a process: a closed reader, exits in user code, signals. Work is finished before messages are printed."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from pact_fast.cli.main import entry, main
from pact_fast.config import RolloutConfig
from pact_fast.errors import PactError, ShutdownRequested
from pact_fast.plugins import load_object, no_exit
from pact_fast.rewards.functions import call_reward_functions
from pact_fast.rollout.agent import AgentLoop
from pact_fast.streams import TolerantStream
from pact_fast.train.shutdown import GracefulShutdown
from tests.support.faults import at_call
from tests.support.processes import WARM, Ranks, environment
from tests.support.runs import TINY_RUN, RunProcess, metrics, saved

pytestmark = pytest.mark.hostile


@pytest.fixture(scope="module", autouse=True)
def threads_before() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY_RUN, "output_dir": str(tmp_path / "run")}))
    return path


# user code that exits

EXITS = {
    "sys.exit": "import sys; sys.exit(0)",
    "raise": "raise SystemExit('bye\\x1b[2J')",
    "exit": "exit(3)",
    "argparse": "import argparse; argparse.ArgumentParser().parse_args(['--help'])",
    "cancelled": "import asyncio; raise asyncio.CancelledError",
}


@pytest.mark.parametrize("how", EXITS)
@pytest.mark.parametrize(
    "kind", ["reward function", "environment", "algorithm", "engine", "tool format", "policy loss"]
)
def test_a_file_that_exits_at_import_is_named(how, kind, tmp_path):
    (tmp_path / f"{how.replace('.', '_')}.py").write_text(f"x = 1\n{EXITS[how]}\n")
    spec = f"{tmp_path}/{how.replace('.', '_')}.py:f"
    with pytest.raises(PactError) as caught:
        load_object(spec, kind)
    assert f"{kind} '{spec}'" in str(caught.value) and f"{how.replace('.', '_')}.py:2)" in str(caught.value)


@pytest.mark.parametrize("how", EXITS)
def test_a_reward_function_that_exits_is_named(how, tmp_path):
    (tmp_path / f"r_{how[:3]}.py").write_text(f"def f(completions, **columns):\n    {EXITS[how]}\n")
    function = load_object(f"{tmp_path}/r_{how[:3]}.py:f", "reward function")
    with pytest.raises(PactError, match=rf"reward function 'f' failed: .*r_{how[:3]}\.py:2\)"):
        call_reward_functions({"f": function}, [], [], [])


@pytest.mark.parametrize("error", [ShutdownRequested(), KeyboardInterrupt(), ValueError("x"), PactError("y")])
def test_other_exceptions_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, no_exit("it"):
        raise error
    assert caught.value is error


ENVIRONMENT = """
class Env:
    blocking = {blocking}
    def reset(self, task): {reset}
    tools = []
    def call(self, name, arguments): {call}
    def reward(self, task, trajectory): {reward}
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reset", "reward"])
def test_an_environment_that_exits_ends_the_run_with_its_name(method, tiny, tmp_path, capsys):
    bodies = {"reset": "return None", "call": "return ''", "reward": "return {'success': 1.0}", "blocking": False}
    (tmp_path / "env.py").write_text(ENVIRONMENT.format(**bodies | {method: "raise SystemExit(0)"}))
    rows = tmp_path / "rows.jsonl"
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    rows.write_text("".join(json.dumps({"prompt": f"Go {i}", "answer": "1", "tools": [tool]}) + "\n" for i in range(4)))
    arguments = [str(tiny), f"data.train={rows}", f"env.name={tmp_path}/env.py:Env", f"data.eval={rows}"]
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the environment Env ended the program: it calls exit (SystemExit: 0)")
    assert "env.py:" in error


# signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_or_raised_and_the_handlers_come_back(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(ShutdownRequested) as caught, GracefulShutdown():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert caught.value.code == caught.value.status == 128 + number
    with GracefulShutdown() as shutdown:
        shutdown.deferred = True
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert shutdown.requested and shutdown.signal_name == number.name
        assert signal.getsignal(number) == before[number]  # a second one ends the process at once
    assert {n: signal.getsignal(n) for n in before} == before


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulShutdown() as shutdown:
            os.kill(os.getpid(), signal.SIGHUP)
            with shutdown.suspended():
                os.kill(os.getpid(), signal.SIGHUP)
            assert not shutdown.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_terminal_that_closes_costs_no_step(tiny, tmp_path):
    run = tmp_path / "run"
    inject = functools.partial(at_call, "pact_fast.train.learner:Learner.update", 2, _hang_up)
    process = RunProcess(run, recipe=[str(tiny), "trainer.max_steps=3"], inject=inject)
    assert process.exit_code() == 0, process.output()
    assert "stopped by SIGHUP: step 2 is saved; continue with resume=auto" in process.output()
    assert saved(run)[-1] == 2 and metrics(run)[-1]["step"] == 2


def _hang_up(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGHUP)


# readers that go away


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk():
    return open("/dev/full", "w")


@pytest.mark.parametrize("make", [closed_pipe, full_disk, lambda: None])
def test_a_message_that_cannot_be_written_is_dropped(make):
    stream = TolerantStream(make())
    for _ in range(3):
        stream.write("text\n" * 10_000)
        stream.flush()
    assert not stream.isatty()
    stream._stream.close() if make is closed_pipe else None  # which flushes: nothing is left
    stream.write("after the end")


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("what", ["2>/dev/full", "2>&1 | true", ">&- 2>&-"])
def test_a_closed_output_pipe_does_not_end_a_run(what, tiny, tmp_path):
    if what == "2>&1 | true":  # Python's handling at exit shows only in a process that the test starts
        command = f"{sys.executable} -m pact_fast train {tiny} {what}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], env=environment(), timeout=600, capture_output=True, check=False)
        assert done.returncode == 0, done
    else:
        process = WARM.Process(
            target=_train_on_a_full_disk if "full" in what else _train_without_output, args=(str(tiny),)
        )
        process.start()
        process.join(600)
        assert process.exitcode == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 1
    first = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert first.startswith(b'{"step"')  # no message got into a file that had taken the closed descriptor's place


def _train_on_a_full_disk(recipe: str) -> None:
    with full_disk() as stream:
        os.dup2(stream.fileno(), 2)
    _enter(["train", recipe])


def _train_without_output(recipe: str) -> None:
    """Files that the run opens get the numbers 1 and 2, and Python has no streams."""
    os.closerange(1, 3)
    sys.stdout = sys.__stdout__ = sys.stderr = sys.__stderr__ = None  # type: ignore[assignment, misc]
    _enter(["train", recipe])


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "status"), [("recipes >/dev/full", 2), ("recipes | true", 141)])
def test_printing_that_fails_is_one_line(arguments, status):
    command = f"{sys.executable} -m pact_fast {arguments}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=environment(), timeout=600, capture_output=True, text=True, check=False
    )
    assert done.returncode in (status, 0) if status == 141 else done.returncode == status, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert status == 141 or done.stderr == "error: cannot write to standard output: No space left on device\n"


# interrupts


def test_closing_the_loop_closes_what_environments_share():
    closed: list[int] = []

    class Factory:
        def close(self) -> None:
            closed.append(1)

    loop = AgentLoop(None, None, Factory(), RolloutConfig())  # type: ignore[arg-type]
    loop.close()
    assert closed == [1]
    AgentLoop(None, None, lambda task: None, RolloutConfig()).close()  # type: ignore[arg-type]


TOOLS = """
import os, signal, threading, time
class Env:
    blocking = True
    def reset(self, task): return None
    tools = []
    def call(self, name, arguments): return ""
    def reward(self, task, trajectory):
        threading.Thread(target=time.sleep, args=(300,)).start()   # a tool that nobody can stop
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.timing
def test_ctrl_c_ends_at_once_while_a_tool_runs(tiny, tmp_path):
    (tmp_path / "env.py").write_text(TOOLS)
    rows = tmp_path / "rows.jsonl"
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    rows.write_text("".join(json.dumps({"prompt": f"Go {i}", "answer": "1", "tools": [tool]}) + "\n" for i in range(4)))
    settings = [f"data.train={rows}", f"env.name={tmp_path}/env.py:Env"]
    process = Ranks(tmp_path, _enter, ["train", str(tiny), *settings], ranks=1)
    assert process.wait(250) == [130], process.output(0)
    assert process.output(0).splitlines()[-1] == "interrupted; continue with resume=auto"
    assert "Traceback" not in process.output(0)
    assert not (tmp_path / "run/run.lock").exists()


def _enter(arguments: list[str]) -> None:
    sys.argv = ["pact-fast", *arguments]
    entry()


def test_no_thread_of_these_tests_is_left(threads_before):
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= threads_before
