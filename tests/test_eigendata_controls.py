"""Controls of synthetic tasks: sound tasks pass all of them, and every kind of broken task is caught and attributed."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from pact_fast.envs.domain.checker import is_said, judge, replay
from pact_fast.envs.domain.controls import check_instance
from pact_fast.envs.domain.instance import Instance
from tests.support import eigendata as support

SAMPLE = 40  # for whole data sets there is a command, see tests/support/eigendata.py
BROKEN = 50

DOMAIN = support.helpdesk()


def test_sound_tasks_pass_every_control_here_and_in_a_second_implementation():
    for instance in support.instances(DOMAIN, SAMPLE):
        assert check_instance(DOMAIN, instance) == [], instance
        assert support.failing_controls(DOMAIN, instance) == [], instance


@pytest.mark.parametrize(
    ("breaks", "blame", "controls"),
    [
        (support.wrong_gold, "task", {"gold_passes", "gold_runs"}),
        (support.vacuous_checker, "checker", {"nothing_fails"}),
        (support.leaking_user, "user", {"keeps_secrets"}),
        (support.unsolvable, "task", {"gold_runs"}),
        (support.order_sensitive_checker, "checker", {"orders_pass"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.slow
def test_broken_tasks_are_caught_and_attributed(breaks, blame, controls):
    rng, found = random.Random(7), Counter()
    issues = 2 if breaks is support.order_sensitive_checker else 1
    for instance in support.instances(DOMAIN, 200, seed=3, issues=issues):
        broken = breaks(DOMAIN, instance, rng)
        if broken is None:
            continue
        findings = check_instance(DOMAIN, broken)
        assert findings, (breaks.__name__, broken)
        found[findings[0].control, findings[0].blame] += 1
    assert found.total() >= BROKEN
    assert {who for _, who in found} == {blame}, found
    assert {control for control, _ in found} <= controls, found


def test_hidden_randomness_of_a_tool_is_caught_and_attributed_to_the_task():
    domain, caught = support.RandomKeys(), 0
    for instance in support.instances(DOMAIN, 150, seed=5, issues=2):
        if not any(step.name in domain.agent and step.name.split("_")[0] in _RANDOM for step in instance.gold):
            continue
        (first, *_) = check_instance(domain, instance)
        assert (first.control, first.blame) == ("repeats", "task")
        caught += 1
    assert caught >= BROKEN


_RANDOM = {"cancel", "refund", "change", "add", "take", "set", "unlock", "send"}


def test_a_wrong_solution_that_is_its_own_yardstick_is_caught():
    """With the state alone compared, gold calls without the restart agree with themselves."""
    for instance in support.instances(DOMAIN, 40, issues=2):
        alone = replace(instance, checker=replace(instance.checker, assertions=()))
        (first, *_) = check_instance(DOMAIN, alone) or [None]
        if support.writes(DOMAIN, instance):
            assert first and (first.control, first.blame) == ("goal_stated", "checker")


def test_a_verdict_needs_state_assertions_and_words():
    instance = next(i for i in support.instances(DOMAIN, 60) if "refund_order" in i.issues)
    played = replay(DOMAIN, instance, instance.gold)
    assert judge(DOMAIN, instance, played.db, [f"You get ${instance.checker.say[0]}.00 back."]).passed
    assert judge(DOMAIN, instance, played.db, ["You get it back."]).unsaid == instance.checker.say[:1]
    played.db["accounts"][instance.subject]["data_left"] += 1
    assert "data_left" in judge(DOMAIN, instance, played.db, instance.checker.say).reason


@pytest.mark.parametrize(
    ("text", "heard", "said"),
    [
        ("45", "you get $45.00", True), ("45", "you get 450", False), ("45", "you get 45.5", False),
        ("1045.5", "that is $1,045.50.", True), ("18 March", "on 18  march", True), ("18 March", "on 8 march", False),
        ("8 March", "on 18 march", False), ("45", "1.45", False), ("007", "agent 007", True), ("7", "agent 007", False),
    ],
)  # fmt: skip
def test_numbers_are_said_by_value_and_texts_as_whole_words(text, heard, said):
    from pact_fast.envs.domain.checker import plain

    assert is_said(text, plain(heard)) is said


def test_an_instance_survives_json():
    for instance in support.instances(DOMAIN, 20):
        again = Instance.from_json(json.loads(json.dumps(instance.to_json())))
        assert again.digest == instance.digest and check_instance(DOMAIN, again) == []
