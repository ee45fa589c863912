"""The C++ library: compiled once, by several processes at a time if need be, and done without when it cannot be."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pact_fast.kernels import backends, linear_logprob
from pact_fast.kernels.runtime import build
from tests.support.processes import Ranks

pytestmark = pytest.mark.slow


class Use(Ranks):
    """A process that uses the kernels, with a cache of its own. Forked: nothing has loaded the library there yet."""

    def __init__(self, folder: Path, cache: Path, **environment: str):
        folder.mkdir()
        self._found = folder / "found.json"
        variables = {"XDG_CACHE_HOME": str(cache), "PACT_FAST_CXXFLAGS": "-O0", **environment}
        super().__init__(folder, use, self._found, variables, ranks=1)

    def found(self) -> tuple[list[list[float]], str, list[str], str]:
        """Log-probs of two calls, the state of the C++ backend, our warnings, and the output."""
        assert self.wait(240) == [0], self.output(0)
        return (*json.loads(self._found.read_text()), self.output(0))


def use(out: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    assert build.status.cache_info().currsize == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hidden, weight, target = torch.ones(3, 4), torch.ones(5, 4), torch.arange(3)
        logprobs = [linear_logprob(hidden, weight, target).logprob.tolist() for _ in range(2)]
    ours = [str(w.message) for w in caught if "pact_fast" in str(w.message)]
    out.write_text(json.dumps([logprobs, backends()["cpp"], ours]))


def needs_compiler():
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


STAND_IN = """#!/bin/sh
echo "$*" >>{calls}
for last; do test "$before" = -o && out=$last; before=$last; done
case "$*" in
    --version) echo stand-in ;;
    *" -c "*) sleep 0.3; touch "$out" ;;
    *) cp {library} "$out" ;;
esac
"""


def test_processes_that_compile_at_once_all_get_a_whole_library_and_later_ones_find_it(cpp_library, tmp_path):
    """In place of the compiler, something that hands out the library of this process: compiling is not in question."""
    if cpp_library != "ready":
        pytest.skip(cpp_library)
    compiler, calls = tmp_path / "c++", tmp_path / "calls"
    compiler.write_text(STAND_IN.format(calls=calls, library=build.build()))
    compiler.chmod(0o755)
    for process in [Use(tmp_path / str(n), tmp_path, CXX=str(compiler)) for n in range(2)]:
        _, state, _, printed = process.found()
        assert state == "ready" and "compiling" in printed
    compiled = calls.read_text().count(" -c ")
    assert compiled == 2 * len(list(build.SOURCES.rglob("*.cpp")))
    assert len(list(tmp_path.rglob("*.so"))) == 1
    _, state, _, printed = Use(tmp_path / "later", tmp_path, CXX=str(compiler)).found()
    assert state == "ready" and "compiling" not in printed
    assert calls.read_text().count(" -c ") == compiled


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_working_compiler_torch_serves_after_one_line(compiler, tmp_path):
    logprobs, state, [warning], _ = Use(tmp_path / "use", tmp_path, CXX=compiler).found()
    assert logprobs[0] == logprobs[1] == pytest.approx([-math.log(5)] * 3)
    assert compiler in state and state != "ready"
    assert "falling back to plain torch" in warning and compiler in warning
    assert not list(tmp_path.rglob("*.so"))
    if compiler == "false":  # its messages are left
        [log] = (tmp_path / "pact_fast").rglob("*.log")
        assert "csrc/" in log.read_text() and ".cpp" in log.read_text()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """The test above covers the handling of such an error."""
    needs_compiler()
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(build.BuildError) as caught:
        build.build()
    [line] = str(caught.value).splitlines()
    assert str(blocked) in line and "XDG_CACHE_HOME" in line


def test_flags_of_the_environment_reach_the_compiler_and_name_another_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    keys = set()
    for flags in ("", "-DFIRST", "-DFIRST -DNAME='two words'"):
        monkeypatch.setenv("PACT_FAST_CXXFLAGS", flags)
        with pytest.raises(build.BuildError) as caught:
            build.build()
        log = Path(str(caught.value).split("its messages: ")[1])
        keys.add(log.stem)
    assert len(keys) == 3
    assert "-DNAME=two words" in build.flags() and "-DFIRST -DNAME=two words" in log.read_text()


@pytest.mark.skipif("-fsanitize" in os.environ.get("PACT_FAST_CXXFLAGS", ""), reason="this is that run")
def test_the_cpp_tests_pass_under_address_sanitizer():
    needs_compiler()
    version = subprocess.run([build.find_compiler(), "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip("tests/run_asan.sh needs GCC")
    environment = os.environ | {"PYTHON": sys.executable}
    command = [Path(__file__).parent / "run_asan.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def test_the_sources_are_part_of_the_package():
    assert {"softmax_fp32.cpp", "scratch.h"} <= {path.name for path in build.SOURCES.rglob("*.*")}
