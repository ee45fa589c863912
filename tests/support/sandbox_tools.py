"""Hostile tools, pools in the situations of `sandbox_contexts`, and checks for leftovers of a tool."""

import contextlib
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from pact_fast.envs.python_tools.pool import SandboxPool
from tests.support import sandbox_contexts
from tests.support.sandbox_contexts import CONTEXTS, WITH_NAMESPACES

MARKS = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux"),
    pytest.mark.slow,
    pytest.mark.hostile,
]
PLAIN = [name for name in CONTEXTS if name not in WITH_NAMESPACES]
MARK = f"pt{os.getpid()}"  # the name of every process of these tools
KEY = 0x9AC7  # of their System V objects
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
NAMED = LIBC + f"libc.prctl(15, b'{MARK}')\n"  # PR_SET_NAME, which children inherit
DAEMON = NAMED + "import time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n  os._exit(0)\n"
CHAINS = NAMED + textwrap.dedent("""
    import time
    end = time.monotonic() + 30
    for _ in range(4):
        if os.fork() == 0:
            os.setsid()
            while time.monotonic() < end:  # hand on
                try:
                    if os.fork(): os._exit(0)
                except OSError:
                    time.sleep(0.001)
            os._exit(0)
""")


def tool(body: str) -> str:
    return "def f(**arguments):\n" + textwrap.indent(textwrap.dedent(body), "  ")


@contextlib.contextmanager
def pool_in(context: str, *, restarts: bool = True, **options) -> Iterator[SandboxPool]:
    """A pool in one of the situations. Without `restarts`, workers that it starts later are in the machine's own."""
    if reason := sandbox_contexts.missing(context):
        pytest.skip(reason)
    folder = sandbox_contexts.public_folder()
    options = {"workers": 1, "timeout": 20.0, "memory_mb": 512} | options
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.ExitStack() as start:
                executable = str(sandbox_contexts.interpreter(context, folder))
                start.enter_context(mock.patch.object(sys, "executable", executable))
                pool = stack.enter_context(SandboxPool(**options))
                if restarts:
                    stack.enter_context(start.pop_all())
            yield pool
            below = [process for pid in pool.worker_pids for process in descendants(pid)]
        assert wait_for(lambda: not any(map(alive, below))), "processes of the worker are left"
    finally:
        shutil.rmtree(folder)
        group = sandbox_contexts.delegated(folder.name)
        assert wait_for(lambda: not list(group.glob("pact-tool-*"))), "a cgroup of the worker is left"
        if group.exists():
            assert wait_for(lambda: not (group / "cgroup.procs").read_text()), "processes of the pool are left"
            group.rmdir()


def descendants(pid: int) -> list[int]:
    below: list[int] = []
    with contextlib.suppress(OSError):
        below = [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return below + [lower for child in below for lower in descendants(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def named() -> list[int]:
    """Processes with the name MARK."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and (folder / "comm").read_text().strip() == MARK:
                found.append(int(folder.name))
    return [pid for pid in found if alive(pid)]


def traces() -> set[str]:
    """Objects that outlive processes and that a tool may have made, visible to it or not."""
    found = {str(path) for folder in ("/dev/shm", "/dev/mqueue") for path in Path(folder).glob(f"*{KEY:x}*")}
    for kind in ("shm", "sem", "msg"):
        for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
            if line.split()[0] == str(KEY):
                found.add(f"{kind} {line.split()[1]}")
    found |= {f"key {line.split()[0]}" for line in Path("/proc/keys").read_text().splitlines() if "pact" in line}
    return found


def wait_for(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def processes(pool: SandboxPool) -> tuple[int, int]:
    """Supervisor and zygote of the pool's only worker."""
    (supervisor,) = pool.worker_pids
    return supervisor, int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])


def folder_of(pool: SandboxPool) -> Path:
    """Return the folder in which the pool's only worker keeps the folders of calls."""
    (worker,) = pool._state.running()
    return Path(worker._folder)


def echo(pool: SandboxPool, text: str) -> str:
    return pool.call(tool("return arguments['text']"), "f", {"text": text})


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process, folder, segment or queue that was not there before."""
    before = traces()
    yield
    if not wait_for(lambda: not named() and not traces() - before):
        remaining = (named(), traces() - before)
        for _ in range(200):  # a chain of processes that fork and exit
            for pid in named():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        pytest.fail(f"left behind: {remaining}")


@pytest.fixture(scope="module", params=CONTEXTS)
def pool(request: pytest.FixtureRequest) -> Iterator[SandboxPool]:
    """A pool in every context; its worker outlives all tests of a file."""
    with pool_in(request.param, restarts=False) as made:
        before = made.worker_pids
        yield made
        assert made.worker_pids == before
