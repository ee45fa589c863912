"""Access of a hostile tool to the machine, in each of the five situations that a worker runs in."""

import os
import shutil
import textwrap

import pytest

from pact_fast.envs.python_tools.pool import SandboxPool
from pact_fast.errors import PactError
from tests.support.sandbox_contexts import CONTEXTS, WITH_NAMESPACES
from tests.support.sandbox_tools import CHAINS, LIBC, MARKS, PLAIN, echo, named, nothing_is_left, pool, pool_in, tool

pytestmark = MARKS
__all__ = ["nothing_is_left", "pool"]


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


@pytest.mark.parametrize(
    "call", ["libc.unshare(1 << 28)", "libc.ptrace(16, 1, None, None)", "libc.syscall(425, 8, None)"]
)
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


def test_a_fork_bomb_has_sixteen_processes_at_most(pool):
    """The tool itself is one of them, and in namespaces two more processes of its user wait for it."""
    body = """
        import os, time
        made = []
        try:
            while len(made) < 40:
                made.append(os.fork())
                if made[-1] == 0:
                    time.sleep(30)
        except OSError:
            pass
        return len(made)
    """
    made = int(pool.call(tool(body), "f", {}))
    assert (10 <= made <= 15) if "count" in pool.protections else made == 40
    assert echo(pool, "next") == "next"


@pytest.mark.parametrize("context", CONTEXTS)
def test_protections_are_those_of_the_situation(context):
    expected = {"ipc", "keys", "sockets"}
    expected |= {"network", "files", "devices", "processes"} if context in WITH_NAMESPACES else set()
    expected |= {"count"} if context != "user-plain" else set()
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
            assert {"network", "files", "devices", "processes", "ipc", "count"} <= pool.protections
            assert ("identity" in pool.protections) == (context == "root")
            assert echo(pool, "a") == "a"
            assert (
                pool.call(tool("import csv, os\nopen('f', 'w').write('x')\nreturn os.listdir('.')"), "f", {}) == '["f"]'
            )
            assert pool.call(tool("open('/var/tmp/leak', 'w')"), "f", {}).startswith("error: OSError: [Errno 30]")
            assert (
                pool.call(tool("import os\nreturn os.listdir('/proc') + os.listdir('/dev/pts')"), "f", {}) == '["ptmx"]'
            )
            assert pool.call(tool("import socket\nsocket.socket(40, 1)"), "f", {}).startswith(
                "error: OSError: [Errno 97]"
            )
            assert pool.call(tool(CHAINS + "return 1"), "f", {}) == "1"
            assert pool.call(tool("import os\nos._exit(163)"), "f", {}).startswith("error: the tool's process ended")
            assert echo(pool, "b") == "b" and not named()
    except PactError as error:
        pytest.skip(f"bubblewrap does not run here: {error}")


def test_a_sandbox_or_protection_that_does_not_exist_is_refused():
    with pytest.raises(PactError, match=r"^env\.args\.sandbox: unknown 'bubble' \(did you mean 'bubblewrap'\?\)"):
        SandboxPool(sandbox="bubble")
    with pytest.raises(
        PactError, match=r"^env\.args\.require: unknown protection 'netwrk' \(did you mean 'network'\?\)"
    ):
        SandboxPool(require=["netwrk"])
    with pytest.raises(PactError, match="must be a list of protections, not 'network'"):
        SandboxPool(require="network")
