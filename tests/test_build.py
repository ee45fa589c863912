"""The C++ library: compiled once, by several processes at a time if need be, and done without when it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pact_fast.kernels.runtime import build

pytestmark = pytest.mark.slow

USE = """
import warnings, torch
from pact_fast.kernels import backends, linear_logprob
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(linear_logprob(torch.ones(3, 4), torch.ones(5, 4), torch.arange(3)).logprob.tolist())
print(backends()["cpp"])
print(*[w.message for w in caught if "pact_fast" in str(w.message)], sep="|")
"""


def start(cache: Path, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PACT_FAST_CXXFLAGS": "-O0", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", USE], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def lines(process: subprocess.Popen) -> tuple[list[str], str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.splitlines(), err


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
    for process in [start(tmp_path, CXX=str(compiler)) for _ in range(2)]:
        out, err = lines(process)
        assert out[2] == "ready" and "compiling" in err
    compiled = calls.read_text().count(" -c ")
    assert compiled == 2 * len(list(build.SOURCES.rglob("*.cpp")))
    assert len(list(tmp_path.rglob("*.so"))) == 1
    out, err = lines(start(tmp_path, CXX=str(compiler)))
    assert out[2] == "ready" and "compiling" not in err
    assert calls.read_text().count(" -c ") == compiled


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_working_compiler_torch_serves_after_one_line(compiler, tmp_path):
    out, _ = lines(start(tmp_path, CXX=compiler))
    assert out[0] == out[1] and out[0].startswith("[-1.609")
    assert compiler in out[2] and out[2] != "ready"
    assert out[3].count("falling back to plain torch") == 1 and compiler in out[3]
    assert not list(tmp_path.rglob("*.so"))
    if compiler == "false":  # its messages are left
        [log] = tmp_path.rglob("*.log")
        assert "csrc/" in log.read_text() and ".cpp" in log.read_text()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """What becomes of such an error, the test above shows."""
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
    done = subprocess.run([Path(__file__).parent / "run_asan.sh"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def test_the_sources_are_part_of_the_package():
    assert {"softmax_fp32.cpp", "scratch.h"} <= {path.name for path in build.SOURCES.rglob("*.*")}
