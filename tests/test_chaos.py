"""Fault injection into whole runs: signals, clock jumps, values that are not finite. docs/faults.md lists the outcomes."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable

import pytest
import torch

from pact_fast.report.rollout_files import read_lines
from pact_fast.train.learner import Learner, UpdateResult
from tests.support.faults import at_call, seconds_since, terminate
from tests.support.runs import STEPS, RunProcess, assert_same, cut_back, metrics, saved

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

AGENT, LEARNER = "pact_fast.rollout.agent:AgentLoop", "pact_fast.train.learner:Learner"
ENGINE = "pact_fast.rollout.embedded.engine:TransformersEngine"
PRETRAINING = 3  # calls of Learner.update before the first step; each step has two

# SIGTERM arrives at the n-th call of a method → exit status, and the newest checkpoint
MOMENTS = {
    "pretraining": (f"{LEARNER}.update", 2, 143, None),
    "the base's evaluation": (f"{ENGINE}.step", 2, 143, None),
    "rollouts": (f"{AGENT}.run", 3, 0, 1),
    "the update before an evaluation": (f"{LEARNER}.update", PRETRAINING + 3, 0, 2),
    "an evaluation": (f"{AGENT}.run", 5, 0, 2),
    "the last update": (f"{LEARNER}.update", PRETRAINING + 8, 0, 4),
    "the last evaluation": (f"{AGENT}.run", 9, 143, 4),
}


@pytest.mark.timing
@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_ends_a_run_soon_and_nothing_is_lost(moment, baseline_run, tmp_path):
    """Inside a step: the step is finished and saved, status 0. Where nothing is to be saved: at once, status 143."""
    place, number, status, newest = MOMENTS[moment]
    run, mark = tmp_path / "run", tmp_path / "mark"
    inject = functools.partial(at_call, place, number, functools.partial(terminate, mark))
    process = RunProcess(run, inject=inject)
    assert process.exit_code() == status, process.output()
    assert seconds_since(mark) < 60
    assert saved(run) == ([] if newest is None else list(range(1, newest + 1)))
    expected = ", and nothing had to be saved" if status else f": step {newest} is saved"
    assert f"stopped by SIGTERM{expected}; continue with resume=auto" in process.output()
    assert "Traceback" not in process.output()
    assert not (run / "summary.json").exists()
    RunProcess(run).succeed()
    assert_same(run, baseline_run)


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_jumps_changes_no_duration(days, baseline_run, tmp_path):
    run = tmp_path / "run"
    started = time.monotonic()
    RunProcess(run, inject=functools.partial(jump_clock, days * 86400.0)).succeed()
    took = time.monotonic() - started
    assert_same(run, baseline_run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    durations = [value for r in records for key, value in r.items() if key.startswith("time/")]
    assert len(durations) >= 4 and all(0 <= value <= took for value in durations)
    assert 0 < json.loads((run / "summary.json").read_text())["wall_seconds"] <= took


def jump_clock(seconds: float) -> None:
    """time.time() jumps in the second step."""
    real, offset = time.time, [0.0]
    time.time = lambda: real() + offset[0]
    at_call(f"{LEARNER}.update", PRETRAINING + 3, lambda *_: offset.__setitem__(0, seconds))


# values that are not finite


def inject_not_finite(first: int, last: int, what: str) -> None:
    """Updates `first` to `last`, from 1, have a loss or gradient that is not finite. None of them may move a weight."""
    update, accumulate = Learner.update, Learner.accumulate
    number = -PRETRAINING

    def counted(self: Learner, batches: list, **options: float) -> UpdateResult:
        nonlocal number
        number += 1
        before = [p.detach().clone() for p in self.model.parameters()]
        result = update(self, batches, **options)
        moved = any(not torch.equal(p, b) for p, b in zip(self.model.parameters(), before, strict=True))
        assert moved != (first <= number <= last)
        return result

    def not_finite(self: Learner, batches: list) -> UpdateResult:
        if not first <= number <= last:
            return accumulate(self, batches)
        if what == "loss":
            return _with_bad_loss(self, lambda: accumulate(self, batches))
        result = accumulate(self, batches)
        next(p.grad for p in self.model.parameters() if p.grad is not None).view(-1)[0] = torch.inf
        return result

    Learner.update, Learner.accumulate = counted, not_finite


def _with_bad_loss(learner: Learner, work: Callable[[], UpdateResult]) -> UpdateResult:
    forward = learner.backend.forward

    def bad(*args):
        loss, *rest = forward(*args)
        return loss * torch.inf, *rest

    learner.backend.forward = bad
    try:
        return work()
    finally:
        learner.backend.forward = forward


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_kept(what, baseline_run, tmp_path):
    run = tmp_path / "run"
    process = RunProcess(run, inject=functools.partial(inject_not_finite, 3, 3, what)).succeed()
    assert "step 2: loss or gradient is not finite; the update is skipped" in process.output()
    records = metrics(run)
    assert [r["step"] for r in records] == STEPS
    assert [r["updates/skipped"] for r in records if "loss" in r] == [0, 1, 0, 0]
    assert records[:2] == metrics(baseline_run)[:2]
    kept = sorted((run / "rollouts").glob("skipped_*"))
    assert [path.name for path in kept] == ["skipped_000002.jsonl.gz"]
    assert len(list(read_lines(kept[0]))) == 4 * 2  # prompts, rollouts of each


def test_too_many_skipped_updates_in_a_row_end_the_run(baseline_run, tmp_path):
    run = tmp_path / "run"
    process = RunProcess(
        run, "trainer.max_skipped_updates=1", inject=functools.partial(inject_not_finite, 5, 8, "loss")
    )
    error = process.error()
    assert "2 updates in a row" in error and "trainer.max_skipped_updates" in error and "skipped_000003.jsonl" in error
    assert "trainer.learning_rate" in error and "resume=auto" in error
    assert saved(run) == [1, 2]
    RunProcess(run).succeed()
    assert_same(run, baseline_run)


REWARDS = {
    "nan": ("return [float('nan')] * len(completions)", "is nan; rewards must be finite numbers"),
    "infinity": ("return [float('inf')] * len(completions)", "is inf; rewards must be finite numbers"),
    "None": ("return None", "returned NoneType; return a list of 8 numbers or None"),
    "too few": ("return [1.0]", "returned 1 values; return a list of 8 numbers or None"),
    "an exception": ("raise ValueError('two\\nlines')", "failed: ValueError: two lines ("),
}


@pytest.mark.parametrize("kind", REWARDS)
def test_a_broken_reward_function_is_named(kind, baseline_run, tmp_path):
    body, problem = REWARDS[kind]
    source = tmp_path / "rewards.py"
    source.write_text(f"def broken(completions, **columns):\n    {body}\n")
    run = cut_back(baseline_run, tmp_path / "run", 3)
    error = RunProcess(run, f"algorithm.reward.functions=[{source}:broken]").error()
    assert "'broken'" in error and problem in error
    assert saved(run) == [1, 2, 3]


def test_a_reward_function_may_return_none(baseline_run, tmp_path):
    source = tmp_path / "rewards.py"
    source.write_text("def silent(completions, **columns):\n    return [None] * len(completions)\n")
    run = cut_back(baseline_run, tmp_path / "run", 3)
    RunProcess(run, f"algorithm.reward.functions=[{source}:silent]").succeed()
    assert_same(run, baseline_run)


# memory


def limit_memory(limit: int) -> None:
    """From the first step on there is no room for packs of more than `limit` tokens, and no turning back, as under ZeRO."""
    from pact_fast.model.policy import Policy
    from pact_fast.train.backends.replicated import Replicated

    Replicated.lockstep = True
    forward, full = Policy.forward, []

    def limited(self, batch, *args):
        if full and len(batch) > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, batch, *args)

    Policy.forward = limited
    at_call(f"{AGENT}.run", 3, lambda *_: full.append(True))


def test_a_run_that_cannot_repeat_the_update_resumes_with_smaller_packs(baseline_run, tmp_path):
    run = tmp_path / "run"
    settings = ["trainer.max_tokens_per_pack=600"]
    process = RunProcess(run, *settings, inject=functools.partial(limit_memory, 350))
    assert process.exit_code() == 2
    assert "is out of memory with packs of 600 tokens; start again with resume=auto" in process.output()
    again = RunProcess(run, *settings, inject=functools.partial(limit_memory, 350))
    again.succeed()
    losses = [[r["loss"] for r in metrics(path) if "loss" in r] for path in (run, baseline_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
