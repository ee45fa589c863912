"""Fixtures of several test files, and set-up of every test."""

import atexit
import functools
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.ci import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_runtest_makereport",
    "pytest_runtest_protocol",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
]

# Else every process that imports torch and transformers compiles them again, which takes longer than to import them
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

_processes: list[str] | None = None  # that the running test has started; None: they are not recorded


def _record_processes(owner: Any, name: str) -> None:
    """Not by an audit hook, which is called at every `id()` of every library, too: three times as slow."""
    start = getattr(owner, name)

    @functools.wraps(start)
    def recorded(*arguments: Any, **options: Any) -> Any:
        if _processes is not None:
            _processes.append(f"{owner.__name__}.{name}{arguments[1:2]}"[:200])
        return start(*arguments, **options)

    setattr(owner, name, recorded)


for _owner, _name in (
    (subprocess.Popen, "__init__"), (os, "fork"), (os, "forkpty"), (os, "posix_spawn"), (os, "posix_spawnp"),
):  # fmt: skip
    _record_processes(_owner, _name)


def pytest_collection_finish() -> None:
    """Freeze the imported objects: scanning all two million takes a third of a second at every collection."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries report leaks


@pytest.fixture(autouse=True)
def only_slow_tests_start_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keeps `pytest -m "not slow"` fast."""
    global _processes
    if request.node.get_closest_marker("slow"):
        yield
        return
    _processes = []
    try:
        yield
        assert not _processes, f"this test starts processes, mark it slow: {_processes[0]}"
    finally:
        _processes = None


@pytest.fixture(autouse=True)
def no_launcher_is_left_behind() -> Iterator[None]:
    """A test that leaves a launcher's variables behind makes later ones wait for processes that never come."""
    yield
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & os.environ.keys()


@pytest.fixture(scope="session", autouse=True)
def vllm_servers() -> Iterator[None]:
    """Servers start from a process that has imported vLLM, where that is installed."""
    if find_spec("vllm") is None:
        yield
        return
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # vLLM compiles two small functions, in every process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, which it fills with zeros
    from tests.support.vllm_servers import forked_servers

    with forked_servers():
        yield


@pytest.fixture(scope="session")
def baseline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the fault tests without a fault."""
    from tests.support.runs import STEPS, RunProcess, metrics

    run = tmp_path_factory.mktemp("baseline") / "run"
    RunProcess(run).succeed()
    assert [record["step"] for record in metrics(run)] == STEPS
    return run


@pytest.fixture(scope="session", autouse=True)
def cpp_library() -> str:
    """Its status. Compiled before the first test, or the first that needs it would count as slow."""
    from pact_fast.kernels.runtime import build

    return build.status()


@pytest.fixture(scope="session")
def bf16_ops(cpp_library: str):
    """torch.ops.pact_fast where its bf16 products run; the test is skipped elsewhere."""
    import torch

    if cpp_library != "ready":
        pytest.skip(f"no C++ library: {cpp_library}")
    if not torch.ops.pact_fast.bf16_gemm_ready():
        pytest.skip("no bf16 products: no AVX512-BF16, or a torch without brgemm")
    return torch.ops.pact_fast
