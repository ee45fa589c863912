"""More rollouts are begun than are kept: groups stay whole, and a run still repeats itself."""

import math

import pytest

from pact_fast.config import load_config
from pact_fast.distributed.world import World
from pact_fast.rollout.agent import AgentLoop
from pact_fast.train.run import Trainer
from tests.support.runs import SETTINGS, metrics

pytestmark = pytest.mark.slow

RUN = [
    *SETTINGS, "device=cpu", "trainer.max_steps=2", "trainer.prompts_per_step=3", "trainer.prompts_per_update=null",
    "rollout.oversampling_factor=1.6",
]  # fmt: skip


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
        Trainer(load_config("quickstart", [*RUN, f"output_dir={tmp_path / name}"])).train()
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
