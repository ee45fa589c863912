"""Runs of PACT on models with windows, attention sinks and recurrent layers: two steps, and a resumed run, bit for bit."""

from __future__ import annotations

import pytest

from tests.support.model_runs import KINDS, recipe
from tests.support.runs import RunProcess, assert_same, cut_back, metrics

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_share_prefixes_and_a_resumed_run_repeats_them(kind, tmp_path):
    settings = [*recipe(tmp_path, kind), "rollout.engine=tests/support/plain_engine.py:Plain"]
    run = tmp_path / "run"
    output = RunProcess(run, recipe=settings).succeed().output()
    assert "prefixes are not shared" not in output
    steps = [record for record in metrics(run) if "loss" in record]
    assert len({record["loss"] for record in steps}) == 2
    assert any(record["reward/std"] > 0 for record in steps)  # so that the policy loss has a gradient, too
    # the sampler, which computes every sequence by itself in the model's own code, and the trainer agree
    assert max(record["mismatch/max"] for record in steps) < 1e-4
    again = cut_back(run, tmp_path / "resumed", 1)
    RunProcess(again, recipe=settings).succeed()
    assert_same(again, run)


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedded_engine_is_refused_before_the_first_step(kind, tmp_path):
    error = RunProcess(tmp_path / "run", recipe=recipe(tmp_path, kind)).error()
    assert KINDS[kind] in error and "use rollout.engine=vllm" in error
