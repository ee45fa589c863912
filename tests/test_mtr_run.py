"""Whole tiny runs on simulated tools: both stages in one run, and PACT on the same rows by one key."""

import json

import pytest

from pact_fast.data.readers import write_tasks
from pact_fast.synthesis.mtr.generated import GeneratedQuestions
from tests.support.runs import RunProcess, metrics

SETTINGS = [
    "threads=1", "pretrain.steps=3", "pretrain.batch_size=2", "trainer.max_steps=2", "trainer.prompts_per_step=2",
    "trainer.eval_tasks=3", "rollout.num_generations=2", "rollout.max_turn_tokens=12", "rollout.max_completion_length=40",
    "model.random_init.hidden_size=32", "model.random_init.intermediate_size=32", "model.random_init.num_hidden_layers=2",
    "model.random_init.head_dim=8", "trainer.log_completions=0",
]  # fmt: skip
PARTS = {f"trace_{name}" for name in ("reward", "answer", "consistency", "grammar", "schema", "evidence", "novelty")}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "pact", "sft"])
def test_the_quickstart_runs_and_logs_every_part_of_the_reward(tmp_path, algorithm):
    rows = tmp_path / "rows.jsonl"
    write_tasks(rows, GeneratedQuestions.tasks({}, 0).train(0, 12))
    extra = {
        "grpo": [],
        "pact": [f"data.train={rows}", f"data.eval={rows}", "env.name=simulated", "env.args={}", "algorithm.name=pact"],
        "sft": ["algorithm.name=sft", "algorithm.sft.final_answer=true", "algorithm.reward.outcome=success"],
    }[algorithm]
    RunProcess(tmp_path / "run", *SETTINGS, *extra, recipe=["mtr-quickstart"]).succeed()
    records = metrics(tmp_path / "run")
    names = {name for record in records for name in record}
    missing = {part for part in PARTS if not any(part in name.split("/") for name in names)}
    assert not missing
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
