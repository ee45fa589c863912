"""Prefetching of rollouts: how many steps ahead, in which order, and where a failure is raised."""

import threading
import time

import pytest

from pact_fast.train.prefetch import RolloutPrefetcher


def test_without_prefetching_work_runs_when_it_is_asked_for():
    main, made = threading.get_ident(), []
    prefetcher = RolloutPrefetcher(lambda step: made.append((step, threading.get_ident())) or step, 3, 0)
    assert [prefetcher.get(step) for step in range(3)] == [0, 1, 2]
    assert made == [(0, main), (1, main), (2, main)]
    assert prefetcher.run(threading.get_ident) == main


@pytest.mark.parametrize("count", [1, 2])
def test_prefetching_stays_within_its_bound_and_the_end_of_the_run(count):
    used, distances = 0, []

    def make(step):
        distances.append(step - used)
        return step

    prefetcher = RolloutPrefetcher(make, 6, count)
    for step in range(6):
        used = step
        assert prefetcher.get(step) == step
        time.sleep(0.02)  # time for the thread to run ahead
    assert max(distances) == count and len(distances) == 6
    prefetcher.close()


def test_sampling_goes_on_during_the_update():
    started = threading.Event()
    prefetcher = RolloutPrefetcher(lambda step: started.set() if step == 1 else step, 3, 1)
    prefetcher.get(0)
    assert started.wait(5)  # step 1 has begun before it is asked for
    prefetcher.close()


def test_a_failure_is_raised_where_the_result_is_asked_for():
    def make(step):
        if step == 1:
            raise ValueError("step 1")
        return step

    prefetcher = RolloutPrefetcher(make, 3, 1)
    assert prefetcher.get(0) == 0
    with pytest.raises(ValueError, match="step 1"):
        prefetcher.get(1)
    prefetcher.close()


def test_other_work_waits_for_its_turn():
    order = []
    prefetcher = RolloutPrefetcher(lambda step: (time.sleep(0.05), order.append(step)), 3, 2)
    prefetcher.get(0)
    prefetcher.run(lambda: order.append("evaluation"))
    assert order == [0, 1, 2, "evaluation"]
    prefetcher.close()
