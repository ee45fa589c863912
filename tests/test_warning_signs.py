"""Warnings of a degenerating run: each shows where it should, is told once, and survives a resume."""

from __future__ import annotations

import json

import pytest

from pact_fast.train.warning_signs import BASELINE_STEPS, RECENT_STEPS, WarningSigns

HEALTHY = {
    "time/step": 1.0, "reward/zero_advantage_groups": 0.4, "prompt/entropy": 0.5, "success": 0.3,
    "control_token_prob": 0.9, "trace/logprob_diff": -0.2,
}  # fmt: skip


def run(late: dict[str, float | None], early: dict[str, float] = {}, steps: int = RECENT_STEPS):  # noqa: B006
    """Values and texts of the last step of BASELINE_STEPS healthy steps and `steps` of `late`."""
    signs, texts = WarningSigns(), []
    for metrics in [HEALTHY | early] * BASELINE_STEPS + [HEALTHY | late] * steps:
        values, new = signs.see(metrics)
        texts += new
    return values, texts


def shown(late: dict[str, float | None], **options) -> set[str]:
    return {name.removeprefix("warnings/") for name, value in run(late, **options)[0].items() if value}


def test_a_healthy_run_has_no_sign_and_says_so_in_its_metrics():
    values, texts = run({})
    assert texts == [] and set(values.values()) == {0.0}
    assert run({}, steps=RECENT_STEPS - 1)[0] == {}  # too early to tell


@pytest.mark.parametrize(
    ("late", "name", "words"),
    [
        ({"reward/zero_advantage_groups": 0.95}, "no_signal", "95% of the groups"),
        ({"prompt/entropy": 0.04}, "entropy", "from 0.500 to 0.040"),
        ({"control_token_prob": 0.4}, "control_tokens", "from 0.90 to 0.40"),
        ({"trace/logprob_diff": -1.5}, "trace_reliance", "-1.50 nats"),
        ({"trace/logprob_diff": 1.5}, "trace_reliance", "+1.50 nats"),
    ],
)
def test_each_sign_shows_and_is_told_once(late, name, words):
    values, texts = run(late, steps=RECENT_STEPS + 4)
    assert {key for key, value in values.items() if value} == {f"warnings/{name}"}
    assert len(texts) == 1 and words in texts[0]


def test_falling_entropy_is_learning_where_success_rises():
    assert shown({"prompt/entropy": 0.01, "success": 0.6}) == set()


def test_a_large_difference_that_was_there_from_the_start_is_no_reliance():
    assert shown({"trace/logprob_diff": -1.5}, early={"trace/logprob_diff": -1.4}) == set()


def test_steps_without_a_metric_count_for_nothing():
    assert shown({"reward/zero_advantage_groups": None}) == set()


def test_a_resumed_run_has_the_same_signs_and_does_not_tell_them_again(tmp_path):
    late = HEALTHY | {"control_token_prob": 0.3}
    records = [HEALTHY] * BASELINE_STEPS + [late] * RECENT_STEPS
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*records, {"step": 3, "eval/success": 0.5}]))
    values, texts = WarningSigns.resumed(path).see(late)
    whole = WarningSigns()
    for record in records:
        whole.see(record)
    assert values == whole.see(late)[0] and values["warnings/control_tokens"] == 1.0
    assert texts == []
