"""Processes of their own: forked from one that has imported everything, or started by `python -m`.

The imports of torch, transformers and the trainer take several seconds of CPU time, more than most tests' own work.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
STACKS_AFTER = 200.0  # seconds; most ranks are given 300
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(
    ["tests.support.preload", "vllm.entrypoints.openai.api_server"]
)  # packages that are not installed are left out


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


class Ranks:
    """`function(*arguments)` in as many forked processes, with the environment variables that torchrun sets.

    With one rank there is no group. Results travel in files.
    """

    def __init__(self, folder: Path, function: Callable[..., object], *arguments: Any, ranks: int = 2):
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        variables = [shared | {"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {} for r in range(ranks)]
        self._processes = [
            WARM.Process(target=_call, args=(log, variable, function, arguments), daemon=True)
            for log, variable in zip(self._logs, variables, strict=True)
        ]
        for process in self._processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    @property
    def exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in self._processes]

    def output(self, rank: int) -> str:
        return self._logs[rank].read_text(errors="replace") if self._logs[rank].exists() else ""

    def wait(self, seconds: float, grace: float = 5) -> list[int | None]:
        """Exit codes. `grace` seconds after one has failed, or at the deadline, the others are killed."""
        deadline = time.monotonic() + seconds
        failed = False
        try:
            while (running := [p for p in self._processes if p.exitcode is None]) and time.monotonic() < deadline:
                if not failed and any(self.exit_codes):
                    failed, deadline = True, min(deadline, time.monotonic() + grace)  # so that the others can report
                connection.wait([process.sentinel for process in running], timeout=1)
            return self.exit_codes
        finally:
            for process in self._processes:
                if process.exitcode is None:
                    process.kill()
                process.join()


def run_ranks(function: Callable[..., object], *arguments: Any, ranks: int = 2, timeout: float = 300) -> None:
    """See Ranks; all must end with status 0 within `timeout` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        started = Ranks(Path(folder), function, *arguments, ranks=ranks)
        codes = started.wait(timeout)
        wrong = [rank for rank, code in enumerate(codes) if code != 0]
        assert not wrong, "\n".join(
            f"rank {rank}, exit status {codes[rank]}:\n{started.output(rank)[-3000:]}" for rank in wrong
        )


def _call(log: Path, variables: Mapping[str, str], function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    redirect_output(log)
    faulthandler.dump_traceback_later(STACKS_AFTER)  # a rank that hangs shows where
    os.environ.update(variables)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children,
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]  # and forks them where it came from
    function(*arguments)


def end_rank() -> NoReturn:
    """End this rank of a host trainer once all have come here, without destructors: those of a trainer that outlive its group
    may wait for ranks that have ended.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def deepspeed_on_gloo() -> None:
    """For ranks, before they use DeepSpeed: it sums over processes with gloo, as over machines.

    By itself it would try the compiler for all of its operators in each process, and compile one for a minute.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


class ForkedModule:
    """Process of `python -m module …`, forked instead of started, with the interface of `subprocess`.

    Args:
        command: Begins with this interpreter and -m.
        env: Variables; those that libraries read when they are loaded have no effect.
        cwd: Its folder.
        stdout: A file of this process for its standard output; None: `run` reads it.
    """

    def __init__(self, command: list[str], *, env: Mapping[str, str], cwd: Path, stdout: Any = None, **_: Any):
        assert command[:2] == [sys.executable, "-m"]
        self.args = command
        self._output = tempfile.TemporaryFile("w+b") if stdout is None else stdout  # noqa: SIM115
        self._errors = tempfile.TemporaryFile("w+b") if stdout is None else stdout  # noqa: SIM115
        streams = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in (self._output, self._errors)]
        self._process = WARM.Process(target=_run_module, args=(command[2:], dict(env), cwd, streams))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    @classmethod
    def run(cls, command: list[str], *, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
        forked = cls(command, env=options["env"], cwd=options["cwd"])
        status = forked.wait(timeout)
        for stream in (forked._output, forked._errors):
            stream.seek(0)
        out, errors = (stream.read().decode() for stream in (forked._output, forked._errors))
        return subprocess.CompletedProcess(command, status, out, errors)


def _run_module(command: list[str], variables: dict[str, str], folder: Path, streams: list[str]) -> None:
    os.setsid()
    for descriptor, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = command[:]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def redirect_output(log: Path) -> None:
    """Standard output and errors of this process, and of all that it starts, go to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
