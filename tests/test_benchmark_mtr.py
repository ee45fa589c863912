"""The benchmark of MTR: its interval, and its conditions of failure."""

from __future__ import annotations

import json

import pytest

from benchmarks import mtr
from pact_fast.train.evaluate import Rate


def test_the_interval_is_that_of_newcombe():
    """The example of Newcombe (1998), 56 of 70 against 48 of 80, method 10."""
    change = mtr.gain({"base_success": rate(48, 80), "success": rate(56, 70)})
    assert (change.mean, *change.ends) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def rate(successes: int, n: int) -> dict:
    return Rate.of([1.0] * successes + [0.0] * (n - successes)).to_json()


@pytest.mark.parametrize(
    "after, consistency, status",
    [(0.85, (0.8, 0.9), 0), (0.72, (0.8, 0.9), 1), (0.85, (0.9, 0.8), 0), (0.5, (0.8, 0.9), 1)],
)
def test_a_gain_must_be_certain_and_consistency_must_not_replace_answers(tmp_path, capsys, after, consistency, status):
    """Finished runs are read, not repeated."""
    for seed in (0, 1):
        run = tmp_path / f"seed_{seed}"
        run.mkdir()
        rates = {"base_success": 0.7, "success": after, "base_greedy": 0.8, "greedy": 0.9}
        summary = {name: rate(round(200 * mean), 200) for name, mean in rates.items()} | {"wall_seconds": 1.0}
        (run / "summary.json").write_text(json.dumps(summary))
        answers = (0.7, after)
        records = [{"step": 0}] + [
            {"reward/trace_answer": answers[i // 10], "reward/trace_consistency": consistency[i // 10]}
            for i in range(20)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--seeds", "0", "1", "--folder", str(tmp_path), "--commit", "0", "--date", "2026-01-01"]
    assert mtr.main(arguments) == status
    assert "| all " in capsys.readouterr().out
