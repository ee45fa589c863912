"""The quickstart learns the same with and without shared prefixes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quickstart_sharing
from pact_fast.config import load_config
from pact_fast.train.learner import Learner
from pact_fast.train.run import Trainer
from tests.support.runs import TOKENIZERS

SMALL = [
    f"model.tokenizer={TOKENIZERS['quickstart']}",
    "trainer.prompts_per_step=4", "trainer.eval_tasks=2", "trainer.log_completions=0",
    "rollout.num_generations=4", "rollout.max_turn_tokens=24", "rollout.max_completion_length=96",
    "pretrain.steps=6", "pretrain.batch_size=4",
    "model.random_init.hidden_size=64", "model.random_init.intermediate_size=128", "model.random_init.num_hidden_layers=2",
]  # fmt: skip


def losses(folder: Path, share: bool) -> list[dict]:
    settings = [*SMALL, "trainer.max_steps=3", f"trainer.share_prefixes={share}", f"output_dir={folder / str(share)}"]
    Trainer(load_config("quickstart", settings)).train()
    records = map(json.loads, (folder / str(share) / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss" in record]


@pytest.mark.slow
def test_a_run_has_the_same_losses_without_sharing(tmp_path):
    shared, unshared = (losses(tmp_path, share) for share in (True, False))
    assert len(shared) == len(unshared) == 3
    for ours, theirs in zip(shared, unshared, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["tokens/computed"] < 0.6 * theirs["tokens/computed"]


@pytest.mark.slow
def test_the_benchmark_compares_the_recipes_own_updates(tmp_path, capsys):
    out = tmp_path / "sharing.json"
    status = quickstart_sharing.main([*SMALL, "--steps", "2", "--rounds", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [failure for failure in report["failures"] if "faster" not in failure] == []
    assert status == (1 if report["failures"] else 0)
    assert len(report["steps"]) == 2 and report["gradient_error"] < 1e-5
    assert report["steps"][0]["loss"]["shared"] != report["steps"][1]["loss"]["shared"]
    assert report["tokens"]["merged"] <= report["tokens"]["shared"] < 0.6 * report["tokens"]["unshared"]
    assert "ratio" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wrong_update_is_a_failure(tmp_path, monkeypatch):
    right = Learner.accumulate

    def wrong(self, batches):
        result = right(self, batches)
        if self.trainer.share_prefixes:
            next(self.model.parameters()).grad.mul_(1.001)
        return result

    monkeypatch.setattr(Learner, "accumulate", wrong)
    assert quickstart_sharing.main([*SMALL, "--steps", "1", "--rounds", "1"]) == 1
