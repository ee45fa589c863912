"""Turns and tool calls of `benchmarks.scale`: a client of a server that answers at once, and tools that wait."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROUNDS = 3
CONTEXT, SAMPLED = 512, 32  # tokens
WAITS = "import time\ndef wait(seconds): time.sleep(seconds)"


@contextmanager
def serve_instantly() -> Iterator[str]:
    """URL of a server that answers every turn at once, in a process of its own: its CPU time does not count."""
    command = [sys.executable, "-m", "benchmarks.instant_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin and server.stdout
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.stdin.close()


def time_turns(url: str, count: int) -> tuple[float, int]:
    """CPU time of this process for turns that are all open at once, from the engine's `submit` to its completions, and
    how often the engine was restarted."""
    from pact_fast.rollout.engine import Request
    from pact_fast.rollout.vllm.client import VllmServerTransport
    from pact_fast.rollout.vllm.engine import VllmEngine
    from pact_fast.train.frozen_heap import frozen_heap

    context: np.ndarray = np.arange(CONTEXT) % 97 + 2
    with tempfile.TemporaryDirectory() as folder:
        transport = VllmServerTransport("the server", url, Path(folder), Path(folder), timeout=600)
        engine = VllmEngine(transport, [1], deadline=600, vocab_size=100)
        engine.version = 0

        def sample(sessions: range) -> None:
            for session in sessions:
                engine.submit(Request(session, context, SAMPLED))
            done = 0
            while done < len(sessions):
                done += len(engine.step(1.0))

        sample(range(16))  # warm: imports
        with frozen_heap():  # as in a run
            began = time.process_time()
            sample(range(16, 16 + count))
            seconds = time.process_time() - began
        transport.close()
    return seconds, engine.restarts


def time_tools(calls: int) -> tuple[float, dict[str, float]]:
    """CPU time of this process, and seconds of wall time of calls that wait for a second each: with workers that must
    start, and again."""
    from pact_fast.envs.python_tools.pool import SandboxPool
    from pact_fast.rollout.env_calls import MAX_CALLS

    began, walls = time.process_time(), []
    with SandboxPool("auto", timeout=30.0) as pool, ThreadPoolExecutor(MAX_CALLS) as threads:
        for _ in range(2):
            started = time.monotonic()
            answers = threads.map(lambda _: pool.call(WAITS, "wait", {"seconds": 1.0}), range(calls))
            assert not any(answer.startswith("error") for answer in answers)
            walls.append(time.monotonic() - started)
    return time.process_time() - began, {"cold wall s": walls[0], "warm wall s": walls[1]}
