"""Several training processes with real vLLM: an engine in each, or servers of their own, under ZeRO-3."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from pact_fast.cli.main import main
from tests.support.processes import deepspeed_on_gloo, run_ranks
from tests.support.vllm_servers import forked_servers

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PLACEMENTS = {
    "colocate": ["trainer.deepspeed.stage=2"],
    "server": ["rollout.vllm_data_parallel_size=2", "trainer.deepspeed.stage=3"],
}
SETTINGS = [
    "trainer.max_steps=3",
    "trainer.save_steps=3",
    "trainer.prompts_per_step=4",
    "trainer.eval_tasks=2",
    "trainer.learning_rate=1e-3",
    "pretrain.steps=3",
    "pretrain.batch_size=2",
    "rollout.engine=vllm",
    "rollout.vllm_args={enforce_eager: true, enable_chunked_prefill: false, max_num_batched_tokens: 2048}",
    "rollout.num_generations=3",
    "rollout.max_turn_tokens=12",
    "rollout.max_prompt_length=480",
    "rollout.max_completion_length=160",
    "threads=1",
]


def train(arguments: list[str]) -> None:
    """In each rank."""
    deepspeed_on_gloo()
    with forked_servers():
        status = main(arguments)
    sys.exit(status)


def losses(run: Path, mode: str) -> list[float]:
    run_ranks(
        train, ["train", "quickstart", f"output_dir={run}", f"rollout.vllm_mode={mode}", *SETTINGS, *PLACEMENTS[mode]]
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(r.get("mismatch/max", 0.0) for r in records) <= 1e-4  # every engine had the current weights
    return [r["loss"] for r in records if "loss" in r]


def test_engines_in_every_process_and_servers_of_their_own_sample_the_same(tmp_path):
    colocated, served = (losses(tmp_path / mode, mode) for mode in PLACEMENTS)
    assert len(colocated) == 3 and colocated == pytest.approx(served, rel=1e-5)
    for folder in ("engine", "engine-1"):  # both servers were at work
        assert "POST" in (tmp_path / "server" / folder / "vllm.log").read_text()
