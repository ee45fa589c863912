"""What a hostile tool leaves behind or reaches, in each of the five situations that a worker runs in."""

import contextlib
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from pact_fast.envs.python_tools.pool import WORKER_FAILED, SandboxPool
from pact_fast.errors import PactError
from tests.support import sandbox_contexts
from tests.support.sandbox_contexts import CONTEXTS, WITH_NAMESPACES

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux"),
    pytest.mark.slow,
    pytest.mark.hostile,
]
PLAIN = [name for name in CONTEXTS if name not in WITH_NAMESPACES]
MARK = f"pt{os.getpid()}"  # the name of every process of these tools
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
NAMED = LIBC + f"libc.prctl(15, b'{MARK}')\n"  # PR_SET_NAME, which children inherit


def tool(body: str) -> str:
    return "def f(**arguments):\n" + textwrap.indent(textwrap.dedent(body), "  ")


@contextlib.contextmanager
def pool_in(context: str, *, restarts: bool = True, **options):
    """A pool in one of the situations. Without `restarts`, workers that it starts later are in the machine's own."""
    if reason := sandbox_contexts.missing(context):
        pytest.skip(reason)
    folder = sandbox_contexts.public_folder()
    options = {"workers": 1, "timeout": 20.0, "memory_mb": 512} | options
    try:
        with mock.patch.object(sys, "executable", str(sandbox_contexts.interpreter(context, folder))):
            pool = SandboxPool(**options)
            if restarts:
                with pool:
                    yield pool
        if not restarts:
            with pool:
                yield pool
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module", params=CONTEXTS)
def pool(request):
    with pool_in(request.param, restarts=False) as pool:
        before = pool.worker_pids
        yield pool
        assert pool.worker_pids == before


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


def named() -> list[int]:
    """Processes with the name MARK."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and (folder / "comm").read_text().strip() == MARK:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(folder.name)] if state != "Z" else []
    return found


def traces() -> set[str]:
    """Objects that outlive processes and that a tool may have made, whoever can see them."""
    found = {str(path) for folder in ("/dev/shm", "/dev/mqueue") for path in Path(folder).glob("pact*")}
    for kind in ("shm", "sem", "msg"):
        for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
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


def folders() -> set[Path]:
    return set(Path("/tmp").glob("pact-tool-*"))


# ---------------------------------------------------------------- requests and answers


class Interrupted(Exception):
    pass


def echo(pool: SandboxPool, text: str) -> str:
    return pool.call(tool("return arguments['text']"), "f", {"text": text})


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, TimeoutError, Interrupted])
def test_an_interrupted_call_leaves_no_answer_to_the_next_one(error):
    def interrupt(*_):
        raise error

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with SandboxPool(workers=1, timeout=5.0) as pool:
            for delay in (0.0005, 0.002, 0.02, 0.1):
                body = tool("import time; time.sleep(0.05); return 'late'")
                with pytest.raises(error):
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    for _ in range(1000):
                        assert pool.call(body, "f", {}) == "late"
                assert [echo(pool, f"{delay} {n}") for n in range(3)] == [f"{delay} {n}" for n in range(3)]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_an_exception_thrown_into_a_waiting_thread_shifts_no_answer():
    import ctypes

    with SandboxPool(workers=1, timeout=5.0) as pool:
        seen: list[object] = []

        def call() -> None:
            try:
                while True:
                    seen.append(echo(pool, "mine"))
            except Interrupted:
                seen.append(Interrupted)

        thread = threading.Thread(target=call)
        thread.start()
        assert wait_for(lambda: seen)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupted))
        thread.join(10.0)
        assert seen[-1] is Interrupted and set(seen[:-1]) == {"mine"}
        assert [echo(pool, str(n)) for n in range(3)] == ["0", "1", "2"]


def test_an_answer_with_the_number_of_another_request_is_refused(monkeypatch):
    with SandboxPool(workers=1, timeout=5.0) as pool:
        first = pool.worker_pids
        (worker,) = pool._state.running()
        monkeypatch.setattr(worker, "_receive", lambda deadline: {"id": 0, "text": "of the call before"})
        assert echo(pool, "a") == WORKER_FAILED
        assert echo(pool, "b") == "b" and pool.worker_pids != first


@pytest.mark.timing
def test_close_ends_calls_under_way_at_once_from_any_thread_and_twice():
    pool = SandboxPool(workers=2, timeout=60.0)
    body = tool(NAMED + "import time\nif os.fork() == 0: time.sleep(60)\ntime.sleep(60)")
    with ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(pool.call, body, "f", {}) for _ in range(4)]  # two of them wait for a worker
        assert wait_for(lambda: len(named()) >= 4)
        started = time.monotonic()
        closing = [threads.submit(pool.close) for _ in range(2)]
        pool.close()
        assert [call.result(3.0) for call in calls] == [WORKER_FAILED] * 4
        for done in closing:
            done.result(3.0)
        assert time.monotonic() - started < 3.0
    with pytest.raises(PactError, match="the tool pool is closed"):
        echo(pool, "x")


# ---------------------------------------------------------------- memory of earlier calls

# looks through the heap and around every object, page by page; write(2) tells which pages can be read
SEARCH = LIBC + textwrap.dedent("""
    import gc, re, resource
    page = 4096
    read_end, write_end = os.pipe()
    top = ctypes.c_ulong(ctypes.cast(libc.sbrk, ctypes.c_void_p) and 0)
    libc.sbrk.restype = ctypes.c_ulong
    libc.sbrk.argtypes = [ctypes.c_long]
    libc.write.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
    heap = libc.sbrk(0) // page
    pages = set(range(heap - 8192, heap))
    for o in gc.get_objects():
        pages.update(range((id(o) >> 20) * 256, (id(o) >> 20) * 256 + 256))
    found, looked = set(), 0
    for number in sorted(pages):
        if libc.write(write_end, number * page, page) == page:
            data = os.read(read_end, page)
            looked += 1
            found.update(re.findall(rb'NEEDLE-[0-9]{9}', data))
    return [looked > 500, sorted(map(bytes.decode, found))]
""")


def test_a_tool_finds_nothing_of_earlier_calls_in_its_memory(pool):
    # pieces of the source, the arguments, the printed text and the answer of calls before, as this call looks for them
    numbers = [f"{123456781 + n}" for n in range(5)]
    needles = ["NEEDLE-" + number for number in numbers]
    source = f"# {needles[0]}\ndef f(**arguments):\n  print('{needles[1]}')\n  return arguments if arguments['a'] else None\n"
    assert pool.call(source, "f", {"a": needles[2]}) == f'{{"a": "{needles[2]}"}}'
    assert pool.call(source, "f", {"a": ""}) == needles[1]
    assert needles[3] in pool.call(f"def f(): raise KeyError('{needles[3]}')", "f", {})
    assert pool.call(tool(SEARCH), "f", {}) == "[true, []]"


def test_the_search_would_find_them(pool):
    kept = "kept = [('NEEDLE-' + str(111111111)).encode() for _ in range(3)]\n"
    assert pool.call(tool(kept + SEARCH), "f", {}) == '[true, ["NEEDLE-111111111"]]'


# ---------------------------------------------------------------- objects of the kernel

KEPT = {
    "System V memory": ("return libc.shmget(0x9AC7, 1 << 20, 0o1666)", "return libc.shmget(0x9AC7, 0, 0)"),
    "System V semaphores": ("return libc.semget(0x9AC7, 1, 0o1666)", "return libc.semget(0x9AC7, 0, 0)"),
    "System V queues": ("return libc.msgget(0x9AC7, 0o1666)", "return libc.msgget(0x9AC7, 0)"),
    "POSIX queues": (
        "return ctypes.CDLL('librt.so.1').mq_open(b'/pact9ac7', 0o102, 0o666, None)",
        "return ctypes.CDLL('librt.so.1').mq_open(b'/pact9ac7', 2)",
    ),
    "keys of the user": (
        "return libc.syscall(248, b'user', b'pact9ac7', b'secret', 6, -4)",
        "return libc.syscall(249, b'user', b'pact9ac7', None, -4)",
    ),
    "keys of the session": (
        "return libc.syscall(248, b'user', b'pact9ac7', b'secret', 6, -3)",
        "return libc.syscall(250, 10, -3, b'user', b'pact9ac7', 0)",
    ),
}


@pytest.mark.parametrize("kind", KEPT)
def test_no_object_of_the_kernel_passes_from_call_to_call(pool, kind):
    if "keys" in kind and os.uname().machine != "x86_64":
        pytest.skip("numbers of x86-64")
    make, look = KEPT[kind]
    pool.call(tool(LIBC + make), "f", {})
    assert pool.call(tool(LIBC + look), "f", {}) == "-1"


@pytest.mark.parametrize("family, kind", [(40, 1), (38, 5), (17, 3), (16, 3), (31, 3), (29, 3), (44, 3)])
def test_other_address_families_cannot_be_used(pool, family, kind):
    body = f"import socket\nsocket.socket({family}, {kind})"
    assert pool.call(tool(body), "f", {}) == "error: OSError: [Errno 97] Address family not supported by protocol"


def test_local_sockets_threads_and_programs_still_work(pool):
    body = """
        import os, socket, _thread
        one, other = socket.socketpair()
        one.send(b'a')
        with socket.socket(socket.AF_INET6): pass
        _thread.start_new_thread(one.send, (b'b',))
        print(other.recv(1).decode(), other.recv(1).decode(), flush=True)
        os.system('echo c')
    """
    assert pool.call(tool(body), "f", {}) == "a b\nc"


@pytest.mark.parametrize("call", ["libc.unshare(1 << 28)", "libc.ptrace(16, 1, None, None)", "libc.syscall(425, 8, None)"])
def test_other_ways_out_are_refused(pool, call):
    """A user namespace, another process's memory, io_uring (which opens sockets by itself)."""
    errors = pool.call(tool(LIBC + f"return [{call}, ctypes.get_errno()]"), "f", {})
    assert errors in ("[-1, 1]", "[-1, 38]")


def test_terminals_and_other_devices_are_out_of_reach_with_namespaces(pool):
    if "devices" not in pool.protections:
        pytest.skip("no namespaces here")
    master, slave = os.openpty()
    name = os.ttyname(slave)
    os.chmod(name, 0o666)
    try:
        for path in (name, "/dev/tty", "/dev/console", "/dev/ptmx", "/dev/kmsg", "/dev/vsock", "/dev/fuse"):
            assert pool.call(tool(f"open({path!r}, 'rb', 0)"), "f", {}).startswith("error: FileNotFoundError"), path
        assert pool.call(tool("import os\nreturn sorted(os.listdir('/dev'))"), "f", {}) == (
            '["full", "null", "random", "urandom", "zero"]'
        )
        body = "open('/dev/null', 'w').write('x')\nreturn [len(open('/dev/urandom', 'rb').read(3)), open('/dev/null').read()]"
        assert pool.call(tool(body), "f", {}) == '[3, ""]'
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("ending", [*(f"os._exit({n})" for n in (128, 137, 163, 191, 192, 255)), "kill 35", "kill 63"])
def test_any_exit_status_and_signal_is_an_ordinary_observation(pool, ending):
    number = ending.removeprefix("kill ")
    body = "import os\n" + (f"os.kill(os.getpid(), {number})" if ending.startswith("kill") else ending)
    before = pool.worker_pids
    cause = f" (signal {number})" if ending.startswith("kill") else ""
    assert pool.call(tool(body), "f", {}) == f"error: the tool's process ended without a result{cause}"
    assert echo(pool, "next") == "next" and pool.worker_pids == before


# ---------------------------------------------------------------- processes and folders

DAEMON = NAMED + "import time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n  os._exit(0)\n"
CHAINS = NAMED + textwrap.dedent("""
    import time
    end = time.monotonic() + 30
    for _ in range(4):
        if os.fork() == 0:
            os.setsid()
            while time.monotonic() < end:  # hand on
                if os.fork(): os._exit(0)
            os._exit(0)
""")
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
    assert pool.call(tool(body), "f", {}, timeout=0.4) in ("1", "error: the tool did not finish within 0.4 s")
    assert echo(pool, "next") == "next"
    assert not named()


@pytest.mark.parametrize("victim", ["supervisor", "zygote", "close"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_processes_and_folders_end_whichever_process_is_killed_first(context, victim):
    before = folders()
    with pool_in(context) as pool, ThreadPoolExecutor(1) as thread:
        (supervisor,) = pool.worker_pids
        zygote = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])
        call = thread.submit(pool.call, tool(CHAINS + "open('file', 'w').close()\ntime.sleep(60)"), "f", {}, 20.0)
        assert wait_for(lambda: len(named()) >= 3)
        if victim == "close":
            pool.close()
        else:
            os.kill(supervisor if victim == "supervisor" else zygote, signal.SIGKILL)
        assert call.result(10.0) == WORKER_FAILED
        assert wait_for(lambda: not named() and folders() <= before)


@pytest.mark.parametrize("context", PLAIN)
def test_the_folder_is_removed_when_both_processes_are_killed(context):
    before = folders()
    with pool_in(context) as pool:
        (supervisor,) = pool.worker_pids
        zygote = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])
        assert folders() > before
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(zygote, signal.SIGKILL)
        os.kill(supervisor, signal.SIGKILL)
        assert echo(pool, "a") == WORKER_FAILED
        assert folders() <= before and echo(pool, "b") == "b"


FOLDERS = {
    "deep": "for _ in range(1200): os.mkdir('d'); os.chdir('d')",
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
    body = f"import os\nfor p in {paths}:\n  open(p, 'w').close()\n  os.makedirs(p + 'd/e')\nreturn [*map(os.path.exists, {paths})]"
    with pool_in(context) as pool:
        assert pool.call(tool(body), "f", {}) == "[true, true, true]"
        echo(pool, "next")
        assert not any(os.path.exists(path) or os.path.exists(path + "d") for path in paths)


# ---------------------------------------------------------------- five hundred calls

HOSTILE = [
    CHAINS + "return 1",
    DAEMON + "os._exit(163)",
    LIBC + KEPT["System V memory"][0],
    LIBC + KEPT["POSIX queues"][0],
    LIBC + KEPT["keys of the user"][0],
    "import os\nos.closerange(0, 100)",
    "import os\nfor n in range(60): os.open('/dev/null', 0)",
    "import os\nfor _ in range(300): os.mkdir('d'); os.chdir('d')",
    "import os\nos.kill(os.getpid(), 9)",
    "import os\nos.kill(-1, 19)",
]


def census(pool: SandboxPool) -> dict[str, object]:
    """What the worker's two processes hold."""
    (supervisor,) = pool.worker_pids
    zygote = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])
    return {
        "descriptors": [len(os.listdir(f"/proc/{pid}/fd")) for pid in (supervisor, zygote)],
        "mounts": Path(f"/proc/{zygote}/mountinfo").read_text().count("\n"),
        "children": len(Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()),
        "folders": len(folders()),
        "worker": supervisor,
    }


@pytest.mark.parametrize("context, calls", [("root", 500), ("user-plain", 50), ("root-container", 50)])
def test_hundreds_of_hostile_calls_leave_nothing_behind(context, calls):
    if "user" in context:
        hostile = [body for body in HOSTILE if "kill(-1" not in body]  # that would end the worker, as documented
    else:
        hostile = HOSTILE
    keys, shared = len(Path("/proc/keys").read_text().splitlines()), set(os.listdir("/dev/shm"))
    with pool_in(context) as pool:
        echo(pool, "first")
        before = census(pool)
        for n in range(calls):
            assert pool.call(tool(hostile[n % len(hostile)]), "f", {}, timeout=1.0) != WORKER_FAILED
        assert echo(pool, "last") == "last"
        assert wait_for(lambda: census(pool) == before), (before, census(pool))
    assert len(Path("/proc/keys").read_text().splitlines()) <= keys + 2 and set(os.listdir("/dev/shm")) <= shared


# ---------------------------------------------------------------- what holds is said


@pytest.mark.parametrize("context", CONTEXTS)
def test_protections_are_those_of_the_situation(context):
    expected = {"ipc", "keys", "sockets"}
    expected |= {"network", "files", "devices", "processes"} if context in WITH_NAMESPACES else set()
    expected |= {"identity"} if context.startswith("root") else set()
    with pool_in(context, require=sorted(expected)) as pool:
        assert pool.protections == expected
        if context in PLAIN:
            line = r"^env\.args\.require: this machine does not give tools the protection network, files; [^\n]*$"
            with pytest.raises(PactError, match=line):
                SandboxPool(workers=1, require=["files", "network", "ipc"])


@pytest.mark.parametrize("context", ["root", "user"])
def test_bubblewrap_serves_the_same_calls(context):
    if not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    try:
        with pool_in(context, sandbox="bubblewrap") as pool:
            assert {"network", "files", "devices", "processes", "ipc"} <= pool.protections
            assert ("identity" in pool.protections) == (context == "root")
            assert echo(pool, "a") == "a"
            assert pool.call(tool("import csv, os\nopen('f', 'w').write('x')\nreturn os.listdir('.')"), "f", {}) == '["f"]'
            assert pool.call(tool("open('/var/tmp/leak', 'w')"), "f", {}).startswith("error: OSError: [Errno 30]")
            assert pool.call(tool("import os\nreturn os.listdir('/proc') + os.listdir('/dev/pts')"), "f", {}) == '["ptmx"]'
            assert pool.call(tool("import socket\nsocket.socket(40, 1)"), "f", {}).startswith("error: OSError: [Errno 97]")
            assert pool.call(tool(CHAINS + "return 1"), "f", {}) == "1"
            assert pool.call(tool("import os\nos._exit(163)"), "f", {}).startswith("error: the tool's process ended")
            assert echo(pool, "b") == "b" and not named()
    except PactError as error:
        pytest.skip(f"bubblewrap does not run here: {error}")


def test_a_sandbox_or_protection_that_does_not_exist_is_refused():
    with pytest.raises(PactError, match=r"^env\.args\.sandbox: unknown 'bubble' \(did you mean 'bubblewrap'\?\)"):
        SandboxPool(sandbox="bubble")
    with pytest.raises(PactError, match=r"^env\.args\.require: unknown protection 'netwrk' \(did you mean 'network'\?\)"):
        SandboxPool(require=["netwrk"])
    with pytest.raises(PactError, match="must be a list of protections, not 'network'"):
        SandboxPool(require="network")
