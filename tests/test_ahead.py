"""Work ahead of its use: how far ahead, in which order, and what happens when it fails."""

import threading
import time

import pytest

from pact_fast.train.prefetch import RolloutPrefetcher


def test_without_ahead_everything_happens_when_asked_for():
    main, made = threading.get_ident(), []
    ahead = RolloutPrefetcher(lambda step: made.append((step, threading.get_ident())) or step, 3, 0)
    assert [ahead.get(step) for step in range(3)] == [0, 1, 2]
    assert made == [(0, main), (1, main), (2, main)]
    assert ahead.run(threading.get_ident) == main


@pytest.mark.parametrize("count", [1, 2])
def test_never_further_ahead_than_allowed_and_never_past_the_end(count):
    used, far = 0, []

    def make(step):
        far.append(step - used)
        return step

    ahead = RolloutPrefetcher(make, 6, count)
    for step in range(6):
        used = step
        assert ahead.get(step) == step
        time.sleep(0.02)  # the thread makes what it may
    assert max(far) == count and len(far) == 6
    ahead.close()


def test_sampling_goes_on_during_the_update():
    started = threading.Event()
    ahead = RolloutPrefetcher(lambda step: started.set() if step == 1 else step, 3, 1)
    ahead.get(0)
    assert started.wait(5)  # step 1 has begun although nobody has asked for it
    ahead.close()


def test_a_failure_arrives_where_the_result_was_wanted():
    def make(step):
        if step == 1:
            raise ValueError("step 1")
        return step

    ahead = RolloutPrefetcher(make, 3, 1)
    assert ahead.get(0) == 0
    with pytest.raises(ValueError, match="step 1"):
        ahead.get(1)
    ahead.close()


def test_other_work_waits_for_its_turn():
    order = []
    ahead = RolloutPrefetcher(lambda step: (time.sleep(0.05), order.append(step)), 3, 2)
    ahead.get(0)
    ahead.run(lambda: order.append("evaluation"))
    assert order == [0, 1, 2, "evaluation"]
    ahead.close()
