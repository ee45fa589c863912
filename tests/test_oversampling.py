"""Oversampling: more rollouts are started than kept, groups stay whole, and a run still repeats itself."""

import math

import pytest

from pact_fast.config import load_config
from pact_fast.rollout.agent import AgentLoop
from pact_fast.train.collect import RolloutCollector, local_jobs
from pact_fast.train.run import Trainer
from tests.support.runs import SETTINGS, metrics

pytestmark = pytest.mark.slow

RUN = [
    *SETTINGS, "device=cpu", "trainer.max_steps=2", "trainer.prompts_per_step=3", "trainer.prompts_per_update=null",
    "rollout.oversampling_factor=1.6",
]  # fmt: skip


def test_a_run_repeats_itself(tmp_path, monkeypatch):
    started, run_jobs, collect = [], AgentLoop.run, RolloutCollector.collect

    def counted(loop, jobs, on_finish=None, keep=None):
        started.append((len(jobs), keep))
        return run_jobs(loop, jobs, on_finish, keep)

    def whole(collector, step, oldest_version):
        groups, stale = collect(collector, step, oldest_version)
        assert [[t.task_id for t in group.trajectories] for group in groups] == [[g.task.id] * 2 for g in groups]
        return groups, stale

    monkeypatch.setattr(AgentLoop, "run", counted)
    monkeypatch.setattr(RolloutCollector, "collect", whole)
    for name in "ab":
        Trainer(load_config("quickstart", [*RUN, f"output_dir={tmp_path / name}"])).train()
    assert started.count((3 * math.ceil(1.6 * 2), 2)) == 4  # the other calls are evaluations
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


@pytest.mark.parametrize("unit", [1, 4])
def test_every_job_has_a_rank_and_units_stay_together(unit):
    blocks = [local_jobs(20, unit, rank, samplers=[0, 2, 3]) for rank in range(4)]
    assert [position for block in blocks for position in block] == list(range(20)) and not blocks[1]
    assert all(block.start % unit == 0 == block.stop % unit for block in blocks)
