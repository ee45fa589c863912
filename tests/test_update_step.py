"""The update benchmark: every method computes the same update or says why not, and a wrong one is a failure."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import harness, update_run, update_step
from benchmarks.update_methods import METHODS, fp32_loss_tokens, packed
from benchmarks.update_peers import flex_forward
from benchmarks.update_problem import Shape, make_problem, token_tree
from pact_fast.kernels import LossContext
from pact_fast.train import learner
from pact_fast.tree import pack, tree_forward
from tests.support.processes import ForkedModule

TINY = ["--device", "cpu", "--model", "tiny", "--shape", "32,24,16,4,8", "--rounds", "1"]


@pytest.fixture(autouse=True)
def attention_functions(monkeypatch):
    """As they were, after each test."""
    from transformers import AttentionInterface

    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))


def run(tmp_path: Path, *options: str) -> tuple[int, dict]:
    out = tmp_path / "update.json"
    status = update_step.main([*TINY, "--out", str(out), *options])
    return status, json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--prompts", "2", "--dtype", "float32"), ("--old",)])
def test_all_methods_compute_the_same_update(tmp_path, capsys, options):
    status, report = run(tmp_path, "--no-memory", "--date", "2026-01-02", *options)
    assert status == 0 and report["failures"] == [] and report["date"] == "2026-01-02"
    (case,) = report["cases"]
    rows = {row["variant"]: row for row in case["rows"]}
    assert list(rows) == list(METHODS)
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert f"{name}" in printed
        if row["status"] != "ok":
            assert not METHODS[name].ours and len(row["status"]) > 5
            continue
        assert max(row["errors"]["float32"].values()) < 1e-5
        parts = row["parts_s"]
        assert set(parts) == {"decoder", "attention", "head", "optimizer", "rest"} | ({"old"} if case["old"] else set())
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) <= 1.5 * max(row["round_ms"]) / 1e3
    assert rows["full-logits"]["tokens"] == case["unshared_tokens"] == case["prompts"] * (4 * (48 + 80) + 56)
    assert rows["tree"]["tokens"] == case["prompts"] * (32 + 24 + 8 + 2 * 4 * 16)
    assert rows["tree"]["ratio_to_tree"] == 1.0 and 0 < rows["tree"]["floor"] < 1


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "subprocess", ForkedModule)  # one that is started: tests/test_benchmarks.py
    status, report = run(tmp_path, "--only", "tree")
    (row,) = report["cases"][0]["rows"]
    assert status == 0 and 0 < row["peak_bytes"] < 1 << 30


@pytest.mark.slow
@pytest.mark.parametrize("what", ["positions", "weights"])
def test_a_wrong_method_is_a_failure(tmp_path, monkeypatch, capsys, what):
    def shifted(model, batch):
        return tree_forward(model, dataclasses.replace(batch, position_ids=np.maximum(batch.position_ids - 1, 0)))

    def wrong(model, problem):
        if what == "positions":
            return packed(model, problem, decoder=shifted)
        return packed(model, dataclasses.replace(problem, weight=problem.weight * 1.0001))

    monkeypatch.setitem(METHODS, "tree", dataclasses.replace(METHODS["tree"], passes=wrong))
    status, report = run(tmp_path, "--no-memory", "--only", "selected-logits", "tree")
    assert status == 1
    assert report["failures"] and all("tree: " in failure for failure in report["failures"])
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.slow
def test_a_case_that_raises_is_a_failure_and_the_others_still_count(tmp_path, monkeypatch, capsys):
    measured = update_step.measure_case

    def sometimes(case, *rest):
        if case.shape.rollouts == 2:
            raise RuntimeError("no such luck")
        return measured(case, *rest)

    monkeypatch.setattr(update_step, "measure_case", sometimes)
    status, report = run(tmp_path, "--shape", "32,24,16,2,8", "--no-memory", "--only", "tree")
    assert status == 1 and len(report["cases"]) == 1
    assert len(report["failures"]) == 1 and "RuntimeError: no such luck" in report["failures"][0]
    assert "FAIL" in capsys.readouterr().out


def test_flex_sees_what_the_tree_sees():
    """Its backward pass needs CUDA; its mask does not."""
    shape = Shape(13, 11, 7, 3, 4)
    case = update_run.UpdateCase("tiny", 2, shape, "float32", 1, False)
    model = update_run.build(case, torch.device("cpu")).eval()
    tree, _ = token_tree(make_problem(shape, 256, seed=0), tuple(LossContext))
    (batch,) = pack([tree], max_tokens=1000)
    with torch.no_grad():
        torch.testing.assert_close(flex_forward(model, batch), tree_forward(model, batch), rtol=0, atol=1e-5)


def test_shapes_are_checked():
    for wrong in ("1,2,3", "a,b,c,d", "8,0,8,2", "8,8,8,1"):
        with pytest.raises(SystemExit, match="--shape"):
            update_step.main(["--shape", wrong])


def test_the_loss_table_is_the_learners():
    """Both are made by pact_fast.batch; weights and targets agree."""
    problem = make_problem(Shape(6, 5, 4, 3, 2), 50, seed=0)
    tree, scored = token_tree(problem, tuple(LossContext))
    (batch,) = pack([tree], max_tokens=1000)
    tokens, (expected, _) = fp32_loss_tokens(batch, scored), learner.loss_table_to_tensors(batch, scored)
    assert len(tokens) == problem.y.size * 2 + len(problem.z)
    for name in ("row", "target", "context", "sequence", "advantage"):
        torch.testing.assert_close(getattr(tokens, name), getattr(expected, name))
    assert float(tokens.rl_weight.sum()) == pytest.approx(1.0)
    assert float(tokens.sft_weight.sum()) == pytest.approx(0.7 * 0.5)
