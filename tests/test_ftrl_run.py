"""FTRL end to end: rollouts and evaluation over all real tasks, and two PACT steps with hand-written expert traces."""

import json
import os
from pathlib import Path

import pytest
import yaml

from pact_fast.cli.main import main
from pact_fast.data.readers import read_tasks, write_tasks

DATA = os.environ.get("PACT_TEST_DATA")
pytestmark = [
    pytest.mark.skipif(not DATA, reason="set PACT_TEST_DATA to the folder that holds ftrl/test.parquet"),
    pytest.mark.slow,
]
FILE = Path(DATA or "") / "ftrl" / "test.parquet"
EXPERT = Path(__file__).parent / "data" / "ftrl_expert.jsonl"


@pytest.fixture
def recipe(tmp_path) -> Path:
    settings = {
        "output_dir": str(tmp_path / "run"),
        "model": {
            "random_init": {
                "model_type": "qwen3",
                "vocab_size": 2048,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "max_position_embeddings": 32768,
            }
        },
        "data": {"train": str(FILE), "eval": str(FILE)},
        "rollout": {
            "num_generations": 2,
            "max_turns": 3,
            "max_turn_tokens": 24,
            "max_completion_length": 96,
            "max_prompt_length": 16384,
            "max_batch_size": 16,
        },
        "algorithm": {"name": "pact"},
        "trainer": {"max_steps": 2, "prompts_per_step": 10, "eval_tasks": 4, "learning_rate": 1e-3},
        "threads": 1,
    }
    path = tmp_path / "ftrl.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_rollouts_run_over_all_hundred_tasks_and_an_evaluation_over_some(recipe, capsys):
    out = recipe.parent / "rollouts.jsonl"
    assert main(["rollout", str(recipe), "--tasks", "100", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({r["task_id"] for r in records}) == 100
    assert all(r["sampled"] and "solve_f1" in r["reward_parts"] for r in records)
    capsys.readouterr()
    assert main(["eval", str(recipe), "trainer.eval_tasks=10", "rollout.max_turn_tokens=12"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tasks"] == 10 and 0 <= result["sampled"]["solve_f1"] <= 1


def test_two_full_pact_steps_with_expert_traces(recipe, tmp_path):
    """Of the tasks that have a trace, and two that have none."""
    ids = [json.loads(line)["id"] for line in EXPERT.read_text().splitlines()]
    assert len(ids) == 10
    tasks = list(read_tasks(str(FILE)))
    traced, others = ([task for task in tasks if (task.id in ids) is wanted] for wanted in (True, False))
    write_tasks(tmp_path / "rows.jsonl", [*traced, *others[:2]])
    arguments = [
        f"data.train={tmp_path / 'rows.jsonl'}",
        f"data.expert={EXPERT}",
        "algorithm.anchor.mode=blend",
        "data.shuffle=false",
        "trainer.prompts_per_step=6",
    ]
    assert main(["train", str(recipe), *arguments, "rollout.num_generations=2"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [s for s in steps if "loss" in s]
    assert [s["step"] for s in steps] == [1, 2]
    assert sum(s["routes/trace_fraction"] for s in steps) * 6 == pytest.approx(10)  # every trace was used, once
    assert all(s["expert/tokens"] > 0 and s["grad_norm"] > 0 for s in steps)
    assert steps[1]["tokens/computed"] < steps[1]["tokens/unshared"]
