"""More rollouts are begun than are kept: groups stay whole, and a run still repeats itself."""

import json
import math

import pytest

from pact_fast.config import load_config
from pact_fast.distributed.world import World
from pact_fast.rollout.agent import AgentLoop
from pact_fast.trainer.loop import Trainer

SETTINGS = [
    "device=cpu",
    "threads=1",
    "trainer.max_steps=2",
    "trainer.prompts_per_step=3",
    "trainer.eval_tasks=2",
    "rollout.num_generations=2",
    "rollout.oversampling_factor=1.6",
    "rollout.max_turn_tokens=12",
    "rollout.max_completion_length=40",
    "pretrain.steps=3",
    "pretrain.batch_size=2",
    "model.random_init.hidden_size=32",
    "model.random_init.intermediate_size=32",
    "model.random_init.num_hidden_layers=2",
    "model.random_init.head_dim=8",
]


def metrics(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time/") and k != "tokens_per_second"} for r in records]


def test_a_run_repeats_itself(tmp_path, monkeypatch):
    begun, run_jobs, exchange = [], AgentLoop.run, Trainer._exchange

    def counted(loop, jobs, on_finish=None, keep=None):
        begun.append((len(jobs), keep))
        return run_jobs(loop, jobs, on_finish, keep)

    def whole(trainer, sampled):
        groups = exchange(trainer, sampled)
        assert [[t.task_id for t in group.trajectories] for group in groups] == [[g.task.id] * 2 for g in groups]
        return groups

    monkeypatch.setattr(AgentLoop, "run", counted)
    monkeypatch.setattr(Trainer, "_exchange", whole)
    for name in "ab":
        Trainer(load_config("quickstart", [*SETTINGS, f"output_dir={tmp_path / name}"])).train()
    assert begun.count((3 * math.ceil(1.6 * 2), 2)) == 4  # the others evaluate
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


@pytest.mark.parametrize("unit", [1, 4])
def test_every_job_has_a_process_and_units_stay_together(unit):
    trainer = Trainer.__new__(Trainer)
    trainer.samplers, shares = [0, 2, 3], []
    for rank in range(4):
        trainer.world = World(rank, 4)
        shares.append(trainer._share(20, unit))
    assert [place for share in shares for place in share] == list(range(20)) and not shares[1]
    assert all(share.start % unit == 0 == share.stop % unit for share in shares)
