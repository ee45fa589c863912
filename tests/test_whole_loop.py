"""The whole-loop benchmark: phases add up, both sides do the same work, and what is wrong is an exit status."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from benchmarks import whole_loop, whole_loop_check, whole_loop_report, whole_loop_task
from benchmarks.whole_loop_pact import Base
from benchmarks.whole_loop_phases import PHASES, Phases
from pact_fast.data.types import Task
from pact_fast.envs.lookup_chain import TraceNoise
from tests.support.optional import needs


class Work:
    """Something whose functions call each other."""

    def outer(self) -> None:
        time.sleep(0.02)
        self.inner()

    def inner(self) -> None:
        time.sleep(0.03)


def test_every_moment_belongs_to_the_innermost_function():
    phases, work = Phases(), Work()
    with contextlib.ExitStack() as stack:
        phases.watch(stack, Work, "outer", "batch")
        phases.watch(stack, Work, "inner", "generation")
        work.inner()  # before the start: not measured
        phases.start()
        work.outer()
        time.sleep(0.01)
        phases.end_step(last=True)
        work.outer()  # nor after the end
    seconds = {phase: times["wall"] for phase, times in phases.seconds.items() if times["wall"]}
    assert seconds.keys() == {"batch", "generation", "other"}
    assert seconds["batch"] >= 0.02 and seconds["generation"] >= 0.03 and seconds["other"] >= 0.01
    assert phases.unexplained() < 0.02
    phases.seconds["batch"]["wall"] += 0.01
    assert phases.unexplained() > 0.1
    assert not hasattr(Work.outer, "__wrapped__")


def test_a_function_that_is_gone_is_an_error():
    with contextlib.ExitStack() as stack, pytest.raises(AttributeError, match="renamed"):
        Phases().watch(stack, Work, "renamed", "batch")


def test_tasks_are_solved_by_their_expert_traces_and_questions_are_held_out():
    tasks = whole_loop_task.LookupTasks(0, (2, 3))
    train, held_out = tasks.train(1, 20), tasks.held_out(20)
    for task in train:
        assert task.expert and task.expert.answer == task.answer == followed(task)
    assert tasks.train(0, 40)[20:] == train
    assert {str(t.prompt) + str(t.answer) for t in train}.isdisjoint(str(t.prompt) + str(t.answer) for t in held_out)
    noisy = whole_loop_task.LookupTasks(0, (2, 3), TraceNoise(early_stop=0.5)).train(0, 40)
    assert 5 < sum(t.expert.answer == t.answer for t in noisy if t.expert) < 35


def followed(task: Task) -> str:
    """The answer, by the class that both trainers run."""
    env = whole_loop_task.Lookups()
    env.reset(prompt=task.prompt, answer=task.answer, **task.columns)
    start, relations = task.prompt[-1]["content"].removeprefix("From ").rstrip(".").split(" follow: ")
    for relation in relations.split():
        start = getattr(env, f"get_{relation}")(of=start)
    return start


def test_success_is_the_answer_in_the_last_message_and_nothing_else():
    def said(content: str, **more) -> list[dict]:
        return [{"role": "tool", "content": "x"}, {"role": "assistant", "content": content, **more}]

    completions = [said(" @ada\n"), said("@ada."), said("@ada", tool_calls=[{}]), said("@ada")[::-1], []]
    assert whole_loop_task.success(completions, ["@ada"] * 5) == [1, 0, 0, 0, 0]


def made(success: tuple[list[float], list[float]], seconds: tuple[float, float], unexplained: float = 0.0) -> dict:
    """A report of one seed with two steps, evaluated after each."""
    phases = {phase: {"wall": 0.0, "cpu": 0.0} for phase in PHASES}
    runs = [
        {
            "side": side, "seed": 0, "success": s, "phases": phases, "unexplained": unexplained,
            "steps": [{"wall": n * t, "cpu": n * t} for n in (1, 2)],
        }
        for side, s, t in zip(whole_loop_report.SIDES, success, seconds, strict=True)
    ]  # fmt: skip
    report = {"settings": {"steps": 2, "points": 2}, "base": {"0": 0.2}, "runs": runs}
    return report | {"summary": whole_loop_report.summary(report, None)}


def test_time_to_the_threshold_is_interpolated():
    report = made(([0.4, 0.8], [0.35, 0.6]), (1.0, 3.0))
    (row,) = report["summary"]["to_threshold"]
    assert row["threshold"] == pytest.approx(0.4)  # halfway from 0.2 to 0.6
    assert row["wall"] == pytest.approx({"pact_fast": 1.0, "trl": 3.6, "ratio": 3.6})
    assert report["summary"]["step_ratio"]["cpu"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert whole_loop_report.failures(report, quick=False) == []
    assert "3.60" in whole_loop_report.tables(report)


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        (made(([0.4, 0.8], [0.35, 0.6]), (1.0, 1.2)), "over ours is 1.44, at least 2"),
        (made(([0.4, 0.8], [0.1, 0.1]), (1.0, 9.0)), "learn differently: success of TRL - ours is -0.50"),
        (made(([0.4, 0.8], [0.35, 0.6]), (1.0, 3.0), unexplained=0.02), "phases differ from the clock by 2.0%"),
        (made(([0.1, 0.1], [0.1, 0.1]), (1.0, 3.0)), "over ours is unknown"),
    ],
)
def test_what_is_wrong_fails_the_command(report, problem):
    assert any(problem in line for line in whole_loop_report.failures(report, quick=False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_sides_do_the_same_work_and_a_difference_is_found(tmp_path, monkeypatch, capsys):
    needs("trl", "datasets", reason="install trl and datasets for the benchmark's peer")
    out = tmp_path / "loop.json"
    command = ["--quick", "--out", str(out), "--work", str(tmp_path / "work")]
    assert whole_loop.main(command) == 0
    report = json.loads(out.read_text())
    assert {run["side"] for run in report["runs"]} == set(whole_loop_report.SIDES)
    for run in report["runs"]:
        assert len(run["steps"]) == len(run["rewards"]) == 2 and len(run["success"]) == 1
        busy = {phase for phase, seconds in run["phases"].items() if seconds["wall"]}
        assert busy >= {"generation", "agent loop", "rewards", "batch", "forward and backward", "optimizer"}
    assert "| forward and backward" in capsys.readouterr().out

    work = tmp_path / "work"
    settings, reward = whole_loop_check.trl_settings, whole_loop_check.success
    monkeypatch.setattr(whole_loop_check, "trl_settings", lambda *given: settings(*given) | {"loss_type": "dr_grpo"})
    monkeypatch.setattr(whole_loop_check, "success", lambda *given: [value + 1 for value in reward(*given)])
    found = whole_loop_check.disagreements(whole_loop.TINY, Base(work / "base"), work / "check.jsonl")
    assert "success 0.0, 1.0 in TRL" in found[0] and found[-1].startswith("gradients differ by")
