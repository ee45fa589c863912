"""`pact-fast eval BENCH`: scores against sums by hand, resumption, settings, and the failures in the viewer."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml

from pact_fast.cli import eval_benchmark
from pact_fast.cli.main import main
from pact_fast.config import Config
from pact_fast.data.readers import read_tasks
from pact_fast.envs.python_tools.env import PythonTools
from pact_fast.envs.python_tools.pool import SandboxPool
from pact_fast.errors import PactError
from pact_fast.evaluation.benchmark import Benchmark, CategoryGroup, benchmark
from pact_fast.evaluation.results import ResultStore, Sample, first_difference
from pact_fast.evaluation.statistics import estimate, pass_hat_k
from pact_fast.evaluation.summary import summarise, summary_table
from tests.support.runs import TINY_RUN

SOURCE = "def double(x):\n    return {'value': 2 * x}\n"
TOOL = {
    "type": "function",
    "function": {
        "name": "double",
        "description": "Twice the number.",
        "parameters": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
    },
}


def ftrl_row(index: int, kind: str) -> dict:
    return {
        "messages": [{"role": "user", "content": f"What is twice {index}?"}],
        "tools": json.dumps([TOOL]),
        "codes": json.dumps({"double": SOURCE}),
        "unsolved_set": json.dumps({"double": [str(2 * index)]}),
        "answer": str(2 * index),
        "data_source": f"self/{kind}",
        "split": "test",
    }


@pytest.fixture
def files(tmp_path) -> Path:
    """A recipe of a tiny random model and six FTRL rows in two kinds."""
    tiny = {**TINY_RUN["model"]["random_init"], "vocab_size": 400}
    recipe = {
        "model": {"random_init": tiny},
        "rollout": {"max_turn_tokens": 6, "max_completion_length": 24, "max_turns": 2},
        "threads": 1,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    rows = [ftrl_row(i, "single_hop" if i % 2 else "multi_hop") for i in range(6)]
    (tmp_path / "ftrl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def evaluate(files: Path, *options: str, status: int = 0) -> dict:
    arguments = ["eval", "ftrl", "--model", str(files / "tiny.yaml"), f"data.eval={files / 'ftrl.jsonl'}"]
    arguments += ["--out", str(files / "out"), "rollout.max_prompt_length=500", *options]
    assert main(arguments) == status
    return json.loads((files / "out" / "summary.json").read_text()) if status == 0 else {}


def test_pass_hat_k_is_the_share_of_subsets_that_succeed():
    for n in range(1, 7):
        for c in range(n + 1):
            outcomes = [i < c for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(combinations(outcomes, k))
                assert pass_hat_k(c, n, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="needs 1 to 2"):
        pass_hat_k(1, 2, 3)


def test_intervals_hold_what_the_normal_approximation_says_and_repeat():
    values = [1.0] * 60 + [0.0] * 140
    one, two = estimate({"a": values}), estimate({"a": values})
    half = 1.96 * np.sqrt(0.3 * 0.7 / 200)
    assert one == two and one.mean == pytest.approx(0.3)
    assert one.low == pytest.approx(0.3 - half, abs=0.012) and one.high == pytest.approx(0.3 + half, abs=0.012)


def test_a_group_weighs_categories_or_tasks():
    values = {"big": [1.0] * 30 + [0.0] * 10, "small": [0.0] * 10}
    assert estimate(values).mean == pytest.approx(0.375)
    assert estimate(values, "task").mean == pytest.approx(0.6)


def test_scores_by_category_are_the_sums_by_hand():
    class Two(Benchmark):
        categories = ("x", "y")
        metrics = {"f1": "F1"}  # noqa: RUF012
        groups = (CategoryGroup("both", ("x", "y")),)

        def tasks(self, category):
            return []

    outcomes = {("x", "x1"): (1, 1), ("x", "x2"): (1, 0), ("y", "y1"): (0, 0)}
    samples = [
        Sample(task, category, k, {"success": float(value), "f1": value / 2}, "answer")
        for (category, task), values in outcomes.items()
        for k, value in enumerate(values)
    ]
    summary = summarise(Two, samples, 2)
    x, y, both = summary["categories"]["x"], summary["categories"]["y"], summary["groups"]["both"]
    assert (x["tasks"], x["pass@1"]["mean"], x["pass^2"]["mean"], x["f1"]["mean"]) == (2, 0.75, 0.5, 0.375)
    assert y["pass@1"]["mean"] == 0 and x["stop_reasons"] == {"answer": 4}
    assert (both["tasks"], both["pass@1"]["mean"], both["pass^2"]["mean"]) == (3, 0.375, 0.25)
    assert summary_table(Two, summary, "title").row_count == 3
    only_x = summarise(Two, [s for s in samples if s.category == "x"], 2)
    assert only_x["groups"] == {}, "a group without all of its categories is no score"


@pytest.mark.slow
def test_an_evaluation_is_written_and_its_failures_open_in_the_viewer(files, capsys):
    summary = evaluate(files, "--limit", "2")
    assert json.loads(capsys.readouterr().out) == summary
    assert list(summary["categories"]) == ["single_hop", "multi_hop"]
    row = summary["categories"]["single_hop"]
    assert row["tasks"] == 2 and set(row) >= {"pass@1", "solve_p", "solve_r", "solve_f1"}
    lines = [json.loads(line) for line in (files / "out" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["page"] == 0 for line in lines if not line["rewards"]["success"])
    assert main(["view", str(files / "out")]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert all(line["task"] in page for line in lines if line["page"] is not None)


@pytest.mark.slow
def test_an_interrupted_evaluation_continues_with_the_same_samples(files, monkeypatch):
    options = ("--samples", "2", "--temperature", "1.0")
    whole = evaluate(files, *options)
    path = files / "out" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 12
    path.write_text("".join(lines[:5]) + lines[5][:20])  # killed in the middle of a line
    assert evaluate(files, *options) == whole
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
    records = (files / "out" / "rollouts" / "eval_000000.jsonl").read_text().splitlines()
    keys = [(r["task_id"], r["sample"]) for r in map(json.loads, records)]
    assert len(keys) == len(set(keys)) == sum('"page": 0' in line for line in lines)
    monkeypatch.setattr(eval_benchmark, "make_session", None)  # a finished evaluation loads no model
    assert evaluate(files, *options) == whole


@pytest.mark.slow
def test_other_settings_are_refused_and_more_tasks_are_not(files, capsys):
    evaluate(files, "--limit", "1")
    assert evaluate(files)["categories"]["multi_hop"]["tasks"] == 3
    evaluate(files, "rollout.max_turn_tokens=5", status=2)
    assert "rollout.max_turn_tokens was 6, now 5" in capsys.readouterr().err
    evaluate(files, "rollout.max_batch_size=2")  # decides nothing


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_a_failure_and_stops_nothing(files):
    rows = (files / "ftrl.jsonl").read_text().splitlines()
    long = json.loads(rows[0])
    long["messages"][0]["content"] = "word " * 800
    (files / "ftrl.jsonl").write_text("\n".join([*rows[1:], json.dumps(long)]) + "\n")
    row = evaluate(files)["categories"]["multi_hop"]
    assert row["stop_reasons"]["prompt_too_long"] == 1 and row["tasks"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "ftrl"], "ftrl is a benchmark: add --model"),
        (["eval", "ftrrl", "--model", "x"], "did you mean 'ftrl'"),
        (["eval", "ftrl", "--model", "quickstart"], "add data.eval=FILE"),
        (["eval", "ftrl", "--model", "quickstart", "--category", "multihop"], "did you mean 'multi_hop'"),
        (["eval", "ftrl", "--model", "quickstart", "--samples", "2"], "needs --temperature"),
        (["eval", "quickstart", "--limit", "3"], "--limit applies to benchmarks only"),
    ],
)
def test_mistakes_are_one_line_with_the_cure(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_first_difference_is_named():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b was 1, now 2"
    assert first_difference({"a": 1}, {"a": 1, "c": 3}) == "c was null, now 3"
    assert first_difference({"a": [1]}, {"a": [1]}) is None


def test_failures_are_spread_over_pages_that_the_viewer_shows_whole(tmp_path):
    store = ResultStore(tmp_path, {})
    for index in range(301):
        store.add(Sample(str(index), "x", 0, {"success": 0.0}), {"task_id": str(index), "sample": 0})
    pages = {path.stem: len(path.read_text().splitlines()) for path in (tmp_path / "rollouts").iterdir()}
    assert pages == {"eval_000000": 300, "eval_000001": 1}
    assert len(ResultStore(tmp_path, {}).samples([(str(i), 0) for i in range(400)])) == 301


def test_results_of_something_else_are_not_overwritten(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(PactError, match=r"without settings\.json"):
        ResultStore(tmp_path, {})


def test_every_benchmark_states_its_categories_and_groups():
    for name in benchmark.names():
        kind = benchmark.get(name)
        assert kind.__doc__ and kind.categories and not set(kind.categories) & set(kind.refused)
        for group in kind.groups:
            assert set(group.categories) <= set(kind.categories), group.name
        assert Config.model_fields.keys() >= {setting.partition(".")[0] for setting in kind.settings}


def toolhop_file(tmp_path) -> Config:
    row = {
        "id": 1, "question": "q?", "answer": "a", "functions": [SOURCE],
        "tools": {"sub": {"name": "double", "description": "d", "parameters": TOOL["function"]["parameters"]}},
    }  # fmt: skip
    (tmp_path / "ToolHop.json").write_text(json.dumps([row, {**row, "id": 2}]))
    return Config(model={"path": "x"}, data={"eval": str(tmp_path / "ToolHop.json")})


def test_toolhop_asks_every_question_in_three_scenarios(tmp_path):
    bench = benchmark.get("toolhop")(toolhop_file(tmp_path))
    tasks = {name: bench.tasks(name) for name in ("direct", "mandatory", "free")}
    ids = [task.id for members in tasks.values() for task in members]
    assert ids == [f"toolhop-{n}/{name}" for name in tasks for n in (1, 2)]
    assert [len(members[0].tools) for members in tasks.values()] == [0, 1, 1]
    prompts = {name: members[0].prompt[-1]["content"] for name, members in tasks.items()}
    assert all(text.endswith("\nQuestion: q?") and "<answer>" in text for text in prompts.values())
    assert "Call a tool in every step" in prompts["mandatory"] and "Call a tool" not in prompts["free"]
    assert "tool" not in prompts["direct"]
    for task in (task for members in tasks.values() for task in members):
        PythonTools.check_task(task)
        assert task.env == "python_tools" and task.env_args["scoring"] == "toolhop"


@pytest.mark.slow
def test_scenarios_become_rows_that_train_in_the_sandbox(tmp_path):
    toolhop_file(tmp_path)
    rows = tmp_path / "rows.jsonl"
    arguments = ["data", "convert", "toolhop", f"data.eval={tmp_path / 'ToolHop.json'}", "-o", str(rows)]
    assert main([*arguments, "--category", "mandatory"]) == 0
    read = read_tasks(rows)
    assert [task.id for task in read] == ["toolhop-1/mandatory", "toolhop-2/mandatory"]
    with SandboxPool(workers=1) as pool:
        env = PythonTools(pool)
        env.reset(read[0])
        assert env.call("double", {"x": 4}) == '{"value": 8}'
        assert env.call("eval", {"x": "1"}).startswith("error: there is no tool 'eval'")
