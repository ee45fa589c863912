"""The learning study: tasks, jobs, statistics and report; and a study of two runs from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import learning, learning_report
from benchmarks.learning_methods import ABLATIONS, ALL, METHODS
from benchmarks.learning_regimes import BASES, REGIMES, TINY
from benchmarks.learning_run import COMMON, Budget, Job, evaluated_steps
from benchmarks.learning_stats import Interval, Paired
from benchmarks.learning_tasks import RARE, ColdTasks, DemonstratedTasks, TaskSet
from pact_fast.chat.rendering import make_renderer
from pact_fast.config import load_config
from pact_fast.envs.lookup_chain import LookupChain, LookupChainTasks
from pact_fast.envs.registry import make_tasks
from pact_fast.errors import PactError
from pact_fast.model.tokenizer import make_tokenizer

PAGE = learning_report.PAGE.read_text("utf-8")
RESULTS = learning_report.ROOT / "benchmarks" / "results" / learning_report.RESULTS


def record(method: str, seed: int, rate: float, part: str, sampled: float, regime: str = "dense") -> dict:
    point = {"step": 4, "sampled": sampled, "greedy": sampled, "tokens": 10, "cpu_seconds": 1.0, "wall_seconds": 2.0}
    return {
        "regime": regime, "method": method, "seed": seed, "learning_rate": rate, "part": part, "curve": [point],
    }  # fmt: skip


def arguments(work: Path, *options: str):
    return learning.arguments([str(work), "--regimes", "dense", "--seeds", "0", "1", "--tries", "2", *options])


def test_an_interval_is_that_of_students_t():
    values = [0.1, 0.4, 0.35, 0.2]
    interval = Interval.of(values)
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert interval.low == pytest.approx(low) and interval.high == pytest.approx(high) and interval.n == 4
    assert Interval.of([0.5]).text() == "0.50"
    assert Interval.of([0.2, 0.4]).text() == "0.30 [-0.97, 1.57]"


def test_differences_are_paired_by_seed():
    a, b = {0: 0.5, 1: 0.7, 2: 0.6, 9: 1.0}, {2: 0.5, 1: 0.3, 0: 0.3}
    paired = Paired.of(a, b)
    assert paired.p == pytest.approx(stats.ttest_rel([0.5, 0.7, 0.6], [0.3, 0.3, 0.5]).pvalue)
    assert paired.difference.mean == pytest.approx(0.7 / 3) and paired.difference.n == 3
    assert math.isnan(Paired.of({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5}).p)


@pytest.mark.parametrize("regime", REGIMES)
def test_settings_of_every_method_are_a_configuration(regime):
    for name, method in ALL.items():
        config = load_config(REGIMES[regime].source, [*COMMON, *Budget().settings, *REGIMES[regime].settings,
                                                      *method.settings_in(REGIMES[regime])])  # fmt: skip
        assert config.trainer.max_steps == Budget().steps, name
    for base in BASES.values():
        assert load_config("quickstart", list(base.settings)).pretrain


def test_every_method_tries_as_many_learning_rates():
    assert len({len(method.rates) for method in ALL.values()}) == 1
    assert METHODS.keys().isdisjoint(ABLATIONS)


def test_points_of_a_run_end_with_its_last_step():
    assert evaluated_steps(Budget(steps=12, points=3)) == [4, 8, 12]
    with pytest.raises(PactError, match="multiple"):
        Budget(steps=10, points=3)


def test_validation_test_and_training_tasks_are_disjoint():
    tasks = TaskSet((1, 3))
    parts = {part: {(t.prompt[-1]["content"], t.answer) for t in tasks.draw(part, 0, 60)} for part in ("train", "test")}
    ids = {part: {t.id for t in tasks.draw(part, 0, 60)} for part in ("validation", "test")}
    assert parts["train"].isdisjoint(parts["test"]) and ids["validation"].isdisjoint(ids["test"])


def test_wrong_calls_are_in_the_trace_and_the_reference_and_not_in_the_answer():
    right, noisy = TaskSet((3, 3)).draw("train", 0, 200), TaskSet((3, 3), wrong_relation=0.2).draw("train", 0, 200)
    assert [task.answer for task in right] == [task.answer for task in noisy]
    pairs = [
        (a, b) for r, n in zip(right, noisy, strict=True) for a, b in zip(r.expert.calls, n.expert.calls, strict=True)
    ]
    wrong = sum(a.name != b.name for a, b in pairs) / len(pairs)
    assert 0.15 < wrong < 0.25
    assert all(task.reference_calls == task.expert.calls for task in noisy)


def test_rare_tools_are_in_no_training_task_and_in_every_test_task():
    shift = REGIMES["shift"]
    for task in shift.train.draw("train", 0, 40):
        assert RARE.isdisjoint(task.env_args["facts"])
    for task in shift.held_out.draw("test", 0, 40):
        assert not RARE.isdisjoint(task.env_args["relations"])


def test_a_demonstrated_prompt_is_the_context_in_which_pact_scores_rollouts():
    config = load_config("quickstart", ["device=cpu", *TINY])
    source = make_tasks(config)
    renderer = make_renderer(config.model, make_tokenizer(config.model, source))
    tasks, plain = DemonstratedTasks(source, demonstrated=0.5).train(-1, 40), source.train(-1, 40)
    pairs = [(shown, task) for shown, task in zip(tasks, plain, strict=True) if shown != task]
    assert 10 <= len(pairs) <= 30
    for shown, task in pairs:
        assert shown.env_args == {} and shown.expert == task.expert  # without noise
        context = renderer.trace_context(task, task.expert, "demonstration").last_branch().ids
        expected = np.concatenate([renderer.prompt_ids(task.prompt, task.tools), context])
        assert np.array_equal(renderer.prompt_ids(shown.prompt, shown.tools), expected)


def test_a_cold_trace_calls_what_the_environment_refuses():
    class Source:
        def train(self, step: int, count: int):
            return LookupChainTasks("train", 0).tasks(count)

        def held_out(self, count: int):
            return []

    tasks = ColdTasks(Source(), wrong=0.9).train(0, 100)
    cold = [task for task in tasks if not task.env_args]
    assert 80 <= len(cold) <= 98
    schema = next(tool for tool in cold[0].tools if tool["function"]["name"] == cold[0].expert.calls[0].name)
    assert cold[0].expert.calls[0].arguments.keys().isdisjoint(schema["function"]["parameters"]["required"])
    assert LookupChain().call("get_boss", cold[0].expert.calls[0].arguments).startswith("error")


def test_tuning_comes_first_and_its_best_learning_rate_is_tested(tmp_path):
    args = arguments(tmp_path, "--methods", "grpo", "pact")
    high, low = METHODS["grpo"].rates[:2]
    jobs = learning.missing_jobs("dense", args, [])
    assert {(job.method, job.learning_rate, job.seed, job.part) for job in jobs} == {
        (name, rate, 100, "validation") for name in ("grpo", "pact") for rate in (high, low)
    }
    records = [record(job.method, 100, job.learning_rate, "validation", 0.5) for job in jobs]
    records[0]["curve"][-1]["sampled"] = 0.6  # grpo, the higher rate
    jobs = learning.missing_jobs("dense", args, records)
    assert [(job.seed, job.method, job.learning_rate) for job in jobs] == [
        (0, "base", 0.0), (1, "base", 0.0),
        (0, "grpo", high), (0, "pact", low), (1, "grpo", high), (1, "pact", low),
    ]  # fmt: skip
    done = record("grpo", 0, high, "test", 0.1)
    assert Job("dense", "grpo", 0, high, "test") not in learning.missing_jobs("dense", args, [*records, done])


def test_a_method_is_left_out_where_the_reward_makes_it_another_one(tmp_path):
    args = learning.arguments([str(tmp_path), "--regimes", "long-outcome"])
    assert "matchtir" not in {job.method for job in learning.missing_jobs("long-outcome", args, [])}


def test_a_line_that_a_killed_process_left_unfinished_is_dropped(tmp_path):
    path = tmp_path / "runs.jsonl"
    learning.append_record(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"b": ')
    assert learning.read_records(path) == [{"a": 1}]
    learning.append_record(path, {"c": 3})
    assert learning.read_records(path) == [{"a": 1}, {"c": 3}]


def test_one_folder_holds_runs_of_one_budget(tmp_path):
    learning.check_budget(tmp_path, Budget())
    learning.check_budget(tmp_path, Budget())
    with pytest.raises(PactError, match="another folder"):
        learning.check_budget(tmp_path, Budget(prompts=5))


def test_the_rank_counts_methods_that_did_better(tmp_path):
    records = [record("pact", s, 1e-3, "test", 0.5 + s / 10) for s in range(2)]
    records += [record("grpo", s, 1e-3, "test", 0.4) for s in range(2)]
    records += [record("sft", s, 1e-3, "test", 0.9) for s in range(2)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": records}))
    rank = learning_report.rank_table(learning_report.Study.read(path))
    assert "| 2 of 3 " in rank and "| `sft` " in rank and "-0.35" in rank


def test_ablations_are_no_methods_to_rank_and_the_trace_has_a_table(tmp_path):
    runs = [record("pact", s, 1e-3, "test", 0.5) | {"trace_logprob_diff": [-0.5 - s, 0.1]} for s in range(2)]
    runs += [record("base", s, 0.0, "test", 0.2) | {"with_trace": {"sampled": 0.9, "greedy": 1.0}} for s in range(2)]
    runs += [record("pact-no-sft", s, 1e-3, "test", 0.9) for s in range(2)]
    runs += [record("grpo", s, 1e-3, "test", 0.4) for s in range(2)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": runs}))
    study = learning_report.Study.read(path)
    assert "| 1 of 2 " in learning_report.rank_table(study)
    assert "| `dense` | 0.20 [0.20, 0.20] " in (table := learning_report.reliance_table(study))
    assert "| 0.90 [0.90, 0.90] " in table and "| -1.00 [" in table
    assert "`pact-no-sft`" in learning_report.regime_table(study, "dense")


def test_only_test_runs_of_the_best_learning_rate_count(tmp_path):
    tuning = [record("pact", 100, rate, "validation", success) for rate, success in ((1e-3, 0.3), (1e-4, 0.4))]
    runs = [record("pact", 0, rate, "test", success) for rate, success in ((1e-3, 0.9), (1e-4, 0.5))]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": [*tuning, *runs, record("base", 0, 0.0, "test", 0.1)]}))
    study = learning_report.Study.read(path)
    assert study.by_seed("dense", "pact", "sampled") == {0: 0.5} and study.by_seed("dense", "base", "sampled") == {
        0: 0.1
    }


def test_numbers_of_the_page_are_those_of_the_committed_results():
    study = learning_report.Study.read(RESULTS)
    assert learning_report.fill(PAGE, learning_report.tables(study)) == PAGE, (
        "run: python -m benchmarks.learning_report"
    )
    assert all(f"<!-- table {name} -->" in PAGE for name in learning_report.tables(study))


@pytest.mark.slow
def test_a_study_runs_to_its_end_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    """In this process, with a base model of two steps; the second start has nothing to do."""
    tiny = ("pretrain.steps=2", "pretrain.batch_size=2")
    for name, base in BASES.items():
        monkeypatch.setitem(BASES, name, dataclasses.replace(base, settings=(*base.settings, *tiny)))
    monkeypatch.setattr(learning, "ProcessPoolExecutor", InProcess)
    out = tmp_path / "results.json"
    options = ["--regimes", "cold", "--methods", "sft", "pact", "--seeds", "0", "--tries", "1", "--steps", "2",
               "--prompts", "2", "--rollouts", "2", "--evaluated", "3", "--bases", "1", "--out", str(out)]  # fmt: skip
    assert learning.main([str(tmp_path / "work"), *options]) == 0
    report = json.loads(out.read_text())
    by_method = {run["method"]: run for run in report["runs"]}
    assert by_method.keys() == {"base", "sft", "pact"} and report["failures"] == []
    for run in by_method.values():
        assert all(0 <= point[kind] <= 1 for point in run["curve"] for kind in ("sampled", "greedy"))
    assert [point["step"] for point in by_method["pact"]["curve"]] == [1, 2]
    first, last = by_method["pact"]["curve"]
    assert 0 < first["tokens"] < last["tokens"] and 0 < first["cpu_seconds"] < last["cpu_seconds"]
    assert by_method["sft"]["curve"][-1]["tokens"] == 0
    monkeypatch.setattr(learning, "perform", None)  # would be called
    assert learning.main([str(tmp_path / "work"), *options]) == 0
    assert json.loads(out.read_text())["runs"] == report["runs"]


class InProcess:
    """Stands in for ProcessPoolExecutor."""

    def __init__(self, *args, **kwargs): ...

    def __enter__(self):
        return self

    def __exit__(self, *args): ...

    def submit(self, function, *args):
        from concurrent.futures import Future

        future: Future = Future()
        future.set_result(function(*args))
        return future
