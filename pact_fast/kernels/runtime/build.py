"""Compiles csrc/ into one library, at first use or ahead of time:  python -m pact_fast.kernels.runtime

The file name of the cached library contains a hash of the sources, torch's version, the compiler, its flags and the
processor, so a change of any of them triggers a new compilation and a stale library is never loaded. Which CPU gets which
kernels: docs/cpu-kernels.md.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pact_fast.files import cache_folder

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
# No -ffast-math: a library linked with it sets flush-to-zero for the whole process when loaded.
FLAGS = [
    *("-std=c++20", "-O3", "-march=native", "-fopenmp-simd", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # stable ABI of torch 2.11
]


class BuildError(RuntimeError):
    """The library cannot be compiled; the message is one line that says why."""


@functools.cache
def status() -> str:
    """Loads the library, compiling it first if it is not cached. Returns "ready", or the reason why it is not available."""
    try:
        torch.ops.load_library(str(build()))
    except (BuildError, OSError) as error:
        return str(error).splitlines()[0]
    return "ready"


def build() -> Path:
    """Path of the compiled library; compiles it unless it is cached.

    Raises:
        BuildError: There is no compiler, it fails, or the cache cannot be written.
    """
    compiler = find_compiler()
    library = cache_folder() / f"pact_fast-{_key(compiler)}.so"
    if not library.exists():
        print("pact_fast: compiling the CPU kernels (once, about fifteen seconds)", file=sys.stderr, flush=True)
        _compile(compiler, library)
    return library


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, else c++, g++ or clang++. Raises BuildError if there is none."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"no C++ compiler: CXX={named} was not found"
        if named
        else "no C++ compiler (c++, g++, clang++) on PATH; install one, for example the package g++"
    )


def flags() -> list[str]:
    """FLAGS, then those of the environment variable PACT_FAST_CXXFLAGS (split as a shell does), which take precedence."""
    return FLAGS + shlex.split(os.environ.get("PACT_FAST_CXXFLAGS", ""))


def _sources(suffix: str) -> list[Path]:
    return sorted(SOURCES.rglob(f"*.{suffix}"))


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text(encoding="utf-8") for path in _sources("cpp") + _sources("h")]
    parts = [torch.__version__, version, " ".join(flags()), _processor(), *sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Model name and feature flags of the CPU, which -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(compiler: str, library: Path) -> None:
    root = Path(torch.__file__).parent
    include = [f"-I{SOURCES}", f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=library.parent)
    except OSError as error:
        raise BuildError(f"cannot write the kernel cache {library.parent}: {error}; set XDG_CACHE_HOME") from error
    try:
        library.with_suffix(".log").unlink(missing_ok=True)
        objects = {source: str(Path(folder) / f"{source.stem}.o") for source in _sources("cpp")}
        compile_commands = [
            [compiler, *flags(), *include, "-c", str(source), "-o", made] for source, made in objects.items()
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # one compiler per core
            list(pool.map(lambda command: _run(command, library), compile_commands))
        linked = Path(folder) / library.name
        _run([compiler, *flags(), *objects.values(), "-o", str(linked), *libraries], library)
        linked.replace(library)  # atomic: several processes may compile at the same time
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str], library: Path) -> None:
    """Run the compiler. Raises BuildError that names a log of its messages."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        log = library.with_suffix(".log")
        with log.open("a", encoding="utf-8") as file:  # of all sources that fail
            file.write(" ".join(command) + "\n" + done.stderr)
        raise BuildError(f"{command[0]} failed to compile the CPU kernels; its messages: {log}")
