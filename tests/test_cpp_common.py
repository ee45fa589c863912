"""csrc/common: scratch capacity and errors in parallel regions, in a C++ program of its own (tests/cpp)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from pact_fast.kernels.runtime import build

pytestmark = pytest.mark.slow
SOURCE = Path(__file__).parent / "cpp" / "test_common.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    made, root = tmp_path_factory.mktemp("cpp") / "test_common", Path(torch.__file__).parent
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++20", "-O1", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{build.SOURCES}"]
    command = [compiler, *flags, f"-I{root / 'include'}", str(SOURCE), "-o", str(made), *libraries, "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_is_checked_and_errors_stop_waiting_threads(program, threads):
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([program], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"ok, {threads} threads\n" and done.returncode == 0, done.stdout + done.stderr
