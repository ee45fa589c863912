"""Tool calls that wait run at the same time, as many as there are."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pact_fast.envs.python_tools.pool import AUTO_WORKERS, SandboxPool
from pact_fast.errors import PactError
from pact_fast.rollout.env_calls import MAX_CALLS

pytestmark = pytest.mark.slow

WAITS = "import time\ndef wait(seconds): time.sleep(seconds)"


@pytest.mark.timing
def test_256_calls_of_a_second_overlap():
    """One after the other on 4 workers they take 64 s; on 64 workers and a quiet machine about 5."""
    with SandboxPool("auto", timeout=30.0) as pool, ThreadPoolExecutor(MAX_CALLS) as threads:
        began = time.monotonic()
        answers = list(threads.map(lambda _: pool.call(WAITS, "wait", {"seconds": 1.0}), range(256)))
        assert time.monotonic() - began < 32
        assert not any(answer.startswith("error") for answer in answers)
        assert len(pool.worker_pids) == AUTO_WORKERS


def test_one_call_at_a_time_needs_one_worker():
    with SandboxPool("auto") as pool:
        for _ in range(3):
            pool.call(WAITS, "wait", {"seconds": 0.0})
        assert len(pool.worker_pids) == 1


@pytest.mark.parametrize("workers", ["many", "4", ""])
def test_other_values_of_workers_are_refused(workers):
    with pytest.raises(PactError, match=r"env\.args\.workers must be a number or auto"):
        SandboxPool(workers)
