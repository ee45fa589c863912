"""Workers are forked from one process: each has all protections, and none depends on the others or on that process."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pact_fast.envs.python_tools.client import Worker
from pact_fast.envs.python_tools.pool import WORKER_FAILED, SandboxPool
from pact_fast.errors import PactError
from tests.support.sandbox_tools import alive, tool, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.hostile]

# protections that a call observes, from the system
PROBE = tool("""
    import ctypes, os, resource, signal, socket, time
    libc = ctypes.CDLL(None, use_errno=True)
    rights = (ctypes.c_uint32 * 6)()
    libc.capget(ctypes.byref((ctypes.c_uint32 * 2)(0x20080522, 0)), rights)
    names = ("AS", "CPU", "FSIZE", "NOFILE", "CORE", "NPROC")
    def refused(action):
        try:
            action()
        except OSError as error:
            return error.errno
    time.sleep(0.5)  # so that another worker must serve the other call
    return {
        "seccomp": libc.prctl(21), "no new privileges": libc.prctl(39, 0, 0, 0, 0), "dumpable": libc.prctl(3),
        "rights": list(rights),
        "limits": [resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in names], "umask": os.umask(0),
        "open": sorted(fd for fd in range(64) if not refused(lambda: os.fstat(fd))), "folder": os.listdir("."),
        "interfaces": len(socket.if_nameindex()) if not refused(socket.if_nameindex) else "none can be seen",
        "devices": sorted(os.listdir("/dev")), "pid": os.getpid(), "environment": sorted(os.environ),
        "child": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "unshare": [libc.unshare(0x10000000), ctypes.get_errno()],
        "write": refused(lambda: open("/usr/pact", "w")), "user": os.getuid(),
    }
""")


def server_pid(pool: SandboxPool) -> int | None:
    server = pool._state._forks._server
    return server._process.pid if server else None


def both(pool: SandboxPool, source: str) -> list[str]:
    """The answers of two workers at once."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda _: pool.call(source, "f", {}), range(2)))


def test_every_worker_has_the_protections_of_the_first():
    with SandboxPool(workers=2, timeout=20.0) as pool:
        first, second = map(json.loads, both(pool, PROBE))
        workers = list(pool._state.running())
        assert len(workers) == 2 and all(worker.protections == pool.protections for worker in workers)
    users = first.pop("user"), second.pop("user")
    if "processes" not in pool.protections:
        del first["pid"], second["pid"]
    assert first == second and first["no new privileges"] == 1 and not any(first["rights"])
    assert "identity" not in pool.protections or users[0] != users[1] != os.getuid()  # each has its own
    assert "keys" not in pool.protections or first["seccomp"] == 2


def test_a_worker_that_protects_less_than_the_first_is_refused(monkeypatch):
    ready = Worker.wait_until_ready

    def weaker(worker, **options):
        ready(worker, **options)
        worker.protections -= {"sockets"}

    with SandboxPool(workers=2, timeout=20.0) as pool:
        monkeypatch.setattr(Worker, "wait_until_ready", weaker)
        with pytest.raises(PactError, match="a tool worker lacks the protection sockets, which the first one has"):
            both(pool, tool("import time; time.sleep(0.5)"))
        assert len(pool.worker_pids) == 1


def test_a_fork_server_that_dies_is_replaced_and_its_workers_go_on():
    with SandboxPool(workers=2, timeout=20.0) as pool:
        (worker,), server = pool.worker_pids, server_pid(pool)
        os.kill(server, signal.SIGKILL)
        assert pool.call(tool("return 1"), "f", {}) == "1" and pool.worker_pids == [worker]
        assert both(pool, tool("import time; time.sleep(0.5); return 2")) == ["2", "2"]
        assert len(pool.worker_pids) == 2 and worker in pool.worker_pids
        assert server_pid(pool) not in (None, server)
        replacement = server_pid(pool)
    assert wait_for(lambda: not alive(replacement)) and server_pid(pool) is None


@pytest.mark.timing
def test_a_stopped_fork_server_is_given_up_when_a_worker_fails():
    with SandboxPool(workers=1, timeout=20.0) as pool:
        (worker,), server = pool.worker_pids, server_pid(pool)
        os.kill(server, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        assert pool.call(tool("return 1"), "f", {}) == WORKER_FAILED
        began = time.monotonic()
        assert pool.call(tool("return 1"), "f", {}) == "1" and time.monotonic() - began < 30
        assert not alive(server) and not alive(worker)


def test_workers_that_start_side_by_side_each_serve_their_own_caller():
    with SandboxPool(workers=12, timeout=20.0) as pool, ThreadPoolExecutor(12) as threads:
        body = tool("import time; time.sleep(0.3); return arguments['n']")
        answers = list(threads.map(lambda n: pool.call(body, "f", {"n": n}), range(24)))
        assert answers == [str(n) for n in range(24)]
        pids, server = pool.worker_pids, server_pid(pool)
        assert len(set(pids)) == 12
    assert wait_for(lambda: not any(map(alive, [*pids, server])))
