"""Processes of their own: forked from one that has imported everything, or started by `python -m`.

The imports of torch, transformers and the trainer take several seconds of CPU time, more than most tests' own work.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(
    [
        "pact_fast.train.run",
        "pact_fast.report",
        "torch.utils.tensorboard",
        "pytest",
        "vllm.entrypoints.openai.api_server",
    ]
)  # what is not installed is left out


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which Python finds `tests` and `benchmarks` of this checkout from any folder."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)} | variables


def run_module(module: str, *arguments: str, ranks: int = 1, timeout: float = 600, **variables: str) -> str:
    """Standard output of `python -m module`, or of torchrun's `ranks` processes. They must end with status 0."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [sys.executable, "-m", *(launcher if ranks > 1 else []), module, *arguments]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_ranks(function: Callable[..., object], *arguments: Any, ranks: int = 2, timeout: float = 300) -> None:
    """Calls `function(*arguments)` in as many forked processes, which see what torchrun tells its own.

    All must end with status 0 within `timeout` seconds. Results travel in files. With one rank there is no group.
    """
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        variables = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {} for r in range(ranks)]
        started = [
            WARM.Process(target=_call, args=(log, variable, function, arguments), daemon=True)
            for log, variable in zip(logs, variables, strict=True)
        ]
        _run_all(started, timeout)
        wrong = [rank for rank, process in enumerate(started) if process.exitcode != 0]
        assert not wrong, "\n".join(
            f"rank {rank}, exit status {started[rank].exitcode}:\n{logs[rank].read_text(errors='replace')[-3000:]}"
            for rank in wrong
        )


def _run_all(processes: list[BaseProcess], timeout: float) -> None:
    """Starts them and waits for all; soon after one has failed, or at the deadline, the others are killed."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.start()
    try:
        while (running := [p for p in processes if p.exitcode is None]) and time.monotonic() < deadline:
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + 5)  # for what the others have to say
            connection.wait([process.sentinel for process in running], timeout=1)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()


def _call(log: Path, variables: Mapping[str, str], function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    redirect_output(log)
    os.environ.update(variables)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children,
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]  # and forks them where it came from
    function(*arguments)


def redirect_output(log: Path) -> None:
    """Standard output and errors of this process, and of all that it starts, go to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
