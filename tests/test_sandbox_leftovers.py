"""Leftovers of a hostile tool in each of the five situations that a worker runs in, for any order of kills."""

import os
import signal
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pact_fast.envs.python_tools import pool as pool_module
from pact_fast.envs.python_tools.pool import WORKER_FAILED, SandboxPool
from tests.support.sandbox_contexts import CONTEXTS
from tests.support.sandbox_tools import (
    CHAINS,
    DAEMON,
    LIBC,
    MARKS,
    NAMED,
    PLAIN,
    echo,
    folder_of,
    named,
    nothing_is_left,
    pool,
    pool_in,
    processes,
    tool,
    wait_for,
)

pytestmark = [*MARKS, pytest.mark.timing]  # deadlines for processes to end
__all__ = ["nothing_is_left", "pool"]


BOMB = NAMED + textwrap.dedent("""
    import time
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try: os.fork() if len(os.listdir('.')) < 12 and not open(str(os.getpid()), 'w').close() else time.sleep(0.01)
        except OSError: pass
""")


@pytest.mark.parametrize("body", [DAEMON + "return 1", CHAINS + "return 1", CHAINS + "time.sleep(60)", BOMB, "stop"])
def test_processes_end_with_the_call(pool, body):
    if body == "stop":
        body = DAEMON + "for _ in range(3):\n  if os.fork() == 0:\n    os.kill(os.getpid(), 19)\nreturn 1"
    observed = pool.call(tool(body), "f", {}, timeout=0.4)
    # the last: the limit of processes, which chains may reach before their first process goes on
    assert observed.startswith(("1", "error: the tool did not finish within 0.4 s", "error: BlockingIOError: "))
    assert echo(pool, "next") == "next"
    assert not any(named() for _ in range(3))


@pytest.mark.parametrize("victim", ["supervisor", "zygote", "close"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_processes_and_folders_end_whichever_process_is_killed_first(context, victim):
    with pool_in(context) as pool, ThreadPoolExecutor(1) as thread:
        (supervisor, zygote), folder = processes(pool), folder_of(pool)
        call = thread.submit(pool.call, tool(CHAINS + "open('file', 'w').close()\ntime.sleep(60)"), "f", {}, 20.0)
        assert wait_for(named)
        if victim == "close":
            pool.close()
        else:
            os.kill(supervisor if victim == "supervisor" else zygote, signal.SIGKILL)
        assert call.result(10.0) == WORKER_FAILED
        assert wait_for(lambda: not named() and not folder.exists())


@pytest.mark.parametrize("context", PLAIN)
def test_the_folder_is_removed_when_both_processes_are_killed(context):
    with pool_in(context) as pool:
        (supervisor, zygote), folder = processes(pool), folder_of(pool)
        assert folder.exists()
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(zygote, signal.SIGKILL)
        os.kill(supervisor, signal.SIGKILL)
        assert echo(pool, "a") == WORKER_FAILED
        assert not folder.exists() and echo(pool, "b") == "b"


FOLDERS = {
    "deep": "for _ in range(1010): os.mkdir('d'); os.chdir('d')",
    "locked": "os.makedirs('a/b/c'); open('a/b/f', 'w').close(); os.chmod('a/b/c', 0); os.chmod('a/b', 0); os.chmod('a', 0)",
    "linked": "os.symlink('/etc', 'a'); os.mkdir('b'); os.symlink('..', 'b/c'); os.mkfifo('p'); os.link('p', 'q')",
    "long names": "for n in range(20): os.mkdir(chr(97 + n) * 255); os.chdir(chr(97 + n) * 255)",
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_folder_of_a_call_is_removed_whatever_is_in_it(pool, kind):
    body = "import os\nhere = os.getcwd()\n" + FOLDERS[kind] + "\nreturn here"
    folder = pool.call(tool(body), "f", {})
    assert folder.startswith("/tmp/")
    assert wait_for(lambda: not Path(folder).exists()) and Path("/etc/passwd").exists()


@pytest.mark.parametrize("context", [name for name in PLAIN if name.startswith("root")])
def test_files_in_shared_folders_are_removed_where_the_tool_has_a_user_id_of_its_own(context):
    paths = [f"{folder}/pact-{os.getpid()}" for folder in ("/dev/shm", "/tmp", "/var/tmp")]
    body = f"import os\nfor p in {paths}:\n  open(p, 'w').close()\n  os.makedirs(p + 'd/e')\n"
    body += f"return [*map(os.path.exists, {paths})]"
    with pool_in(context) as pool:
        assert pool.call(tool(body), "f", {}) == "[true, true, true]"
        echo(pool, "next")
        assert not any(os.path.exists(path) or os.path.exists(path + "d") for path in paths)


HOSTILE = [
    CHAINS + "return 1",
    DAEMON + "os._exit(163)",
    LIBC + "return libc.shmget(0x9AC7, 1 << 20, 0o1666)",
    LIBC + "return ctypes.CDLL('librt.so.1').mq_open(b'/pact9ac7', 0o102, 0o666, None)",
    LIBC + "return libc.syscall(248, b'user', b'pact9ac7', b'secret', 6, -4)",
    "import os\nos.closerange(0, 100)",
    "import os\nfor n in range(60): os.open('/dev/null', 0)",
    "import os\nfor _ in range(300): os.mkdir('d'); os.chdir('d')",
    "import os\nos.kill(os.getpid(), 9)",
    "import os\nos.kill(-1, 19)",
]


def census(pool: SandboxPool) -> dict[str, int]:
    """Count the resources of the worker's two processes."""
    supervisor, zygote = processes(pool)
    return {
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (supervisor, zygote)),
        "mounts": Path(f"/proc/{zygote}/mountinfo").read_text().count("\n"),
        "children": len(Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()),
        "folders": len(os.listdir(folder_of(pool))),
        "worker": supervisor,
    }


def settled(pool: SandboxPool) -> dict[str, int]:
    """The census once the next call waits: its pipes have been opened, handed over and closed by then."""
    seen = [census(pool)]

    def rests() -> bool:
        seen.append(census(pool))
        return seen[-1]["children"] == 1 and len(seen) > 10 and all(one == seen[-1] for one in seen[-10:])

    assert wait_for(rests), seen[-10:]
    return seen[-1]


@pytest.mark.parametrize("context, calls", [("root", 500), ("user-plain", 50), ("root-container", 50)])
def test_hundreds_of_hostile_calls_leave_nothing_behind(context, calls, monkeypatch):
    monkeypatch.setattr(pool_module, "GRACE_SECONDS", 60.0)  # other programs may keep the machine busy
    if "user" in context:
        hostile = [body for body in HOSTILE if "kill(-1" not in body]  # that would end the worker, as documented
    else:
        hostile = HOSTILE
    with pool_in(context) as pool:
        echo(pool, "first")
        before = settled(pool)
        for n in range(calls):
            assert pool.call(tool(hostile[n % len(hostile)]), "f", {}, timeout=1.0) != WORKER_FAILED
        assert echo(pool, "last") == "last"
        assert wait_for(lambda: census(pool) == before), (before, census(pool))
