"""Callers that are interrupted, and pools that are closed in the middle of calls: no answer goes to another call."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pact_fast.envs.python_tools.pool import WORKER_FAILED, SandboxPool, _Job
from pact_fast.errors import PactError
from tests.support.sandbox_tools import MARKS, NAMED, echo, named, nothing_is_left, tool, wait_for

pytestmark = MARKS
__all__ = ["nothing_is_left"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, TimeoutError, Interrupted])
def test_an_interrupted_call_leaves_no_answer_to_the_next_one(error):
    def interrupt(*_):
        raise error

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with SandboxPool(workers=1, timeout=5.0) as pool:
            for delay in (0.0005, 0.002, 0.02, 0.1):
                body = tool("import time; time.sleep(0.05); return 'late'")
                with pytest.raises(error):
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    for _ in range(1000):
                        assert pool.call(body, "f", {}) == "late"
                assert [echo(pool, f"{delay} {n}") for n in range(3)] == [f"{delay} {n}" for n in range(3)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_an_exception_thrown_into_a_waiting_thread_shifts_no_answer():
    import ctypes

    with SandboxPool(workers=1, timeout=5.0) as pool:
        seen: list[object] = []

        def call() -> None:
            try:
                while True:
                    seen.append(echo(pool, "mine"))
            except Interrupted:
                seen.append(Interrupted)

        thread = threading.Thread(target=call)
        thread.start()
        assert wait_for(lambda: seen)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupted))
        thread.join(10.0)
        assert seen[-1] is Interrupted and set(seen[:-1]) == {"mine"}
        assert [echo(pool, str(n)) for n in range(3)] == ["0", "1", "2"]


def test_an_answer_with_the_number_of_another_request_is_refused(monkeypatch):
    with SandboxPool(workers=1, timeout=5.0) as pool:
        first = pool.worker_pids
        (worker,) = pool._state.running()
        monkeypatch.setattr(worker, "_receive", lambda deadline: {"id": 0, "text": "of the call before"})
        assert echo(pool, "a") == WORKER_FAILED
        assert echo(pool, "b") == "b" and pool.worker_pids != first


@pytest.mark.timing
def test_close_ends_calls_under_way_at_once_from_any_thread_and_twice():
    pool = SandboxPool(workers=2, timeout=60.0)
    body = tool(NAMED + "import time\nif os.fork() == 0: time.sleep(60)\ntime.sleep(60)")
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(pool.call, body, "f", {}) for _ in range(4)]  # two of them wait for a worker
        assert wait_for(lambda: len(named()) >= 4)
        started = time.monotonic()
        closing = [threads.submit(pool.close) for _ in range(2)]
        pool.close()
        assert [call.result(3.0) for call in calls] == [WORKER_FAILED] * 4
        for done in closing:
            done.result(3.0)
        assert time.monotonic() - started < 3.0
    with pytest.raises(PactError, match="the tool pool is closed"):
        echo(pool, "x")


def test_what_a_signal_handler_raises_reaches_the_caller_wherever_it_waits():
    """Also between two lines of the code that waits: 1.5 % of these are another exception where that is a Future."""
    armed = False

    def interrupt(*_):
        nonlocal armed
        if armed:
            armed = False
            raise Interrupted

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(2000):
            job = _Job({}, 1.0)
            with pytest.raises(Interrupted):
                armed = True
                # again, as the first one may come just before the system call that waits
                signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + number % 40), 0.02)
                job.result()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
