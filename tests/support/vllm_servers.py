"""vLLM servers that are forked from a process which has imported vLLM.

A server imports vLLM three times: for its API, its engine core, and its worker. That takes half a minute of CPU time, ten
times as much as all else that it does in a test. `test_vllm_doctor.py` starts one in the ordinary way.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from multiprocessing.context import BaseContext
from typing import IO
from unittest import mock

from pact_fast.llm import server
from pact_fast.rollout.vllm import process
from pact_fast.vllm_process import terminate_with_parent
from tests.support.processes import WARM

COLD_LAUNCH = process.launch


class Server:
    """The part of subprocess.Popen that the trainer uses."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: IO[bytes]):
        assert command[:2] == [sys.executable, "-m"]
        arguments = (command[2:], dict(environment), log.name)
        self._process = WARM.Process(target=_serve, args=arguments, daemon=True)  # ends with the tests, at the latest
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self) -> int | None:
        self._process.join()
        return self.returncode


@contextlib.contextmanager
def forked_servers() -> Iterator[None]:
    """Inside, servers of rollouts and of language models are forked."""
    with mock.patch.object(process, "launch", Server), mock.patch.object(server, "launch", Server):
        yield


def _serve(command: list[str], environment: dict[str, str], log: str) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
    os.setsid()
    terminate_with_parent()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = command[1:]
    with mock.patch.object(multiprocessing, "get_context", _forking_context):
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _forking_context(method: str | None = None) -> BaseContext:
    """vLLM's CPU build spawns its processes."""
    return multiprocessing.context._default_context.get_context("fork" if method == "spawn" else method)
