"""The process behind SandboxPool: imports the common modules once, then forks a fresh process for every call.

`pact_fast.envs.python_tools.pool` runs this file as a script. It uses the standard library only, and nothing of this package.

    trainer ─ socket ─ server ─ fork ─ keeper ─ fork ─ init ─ fork ─ tool
                       (one per worker)        (a new PID namespace, if the system allows it)

The server lives on; the other three are made in advance, wait for a request and serve one call. The tool's process runs
untrusted source and reports one frame on a pipe; the server trusts nothing it reads there. When it has answered, the
server kills the keeper, which takes init with it, and with init the kernel kills whatever the tool left in its
namespace. Without namespaces the tool is the server's own child, and the server kills all its descendants.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

# Imported before any fork: what tools commonly use. Each module makes every fork dearer; tools may import others.
# fmt: off
PRELOAD = (
    "_strptime", "base64", "bisect", "calendar", "cmath", "collections.abc", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "json", "math", "operator", "random",
    "re", "statistics", "string", "time", "typing", "unicodedata", "uuid", "zoneinfo",
)
# fmt: on

LENGTH = struct.Struct("!I")  # messages on the socket and on the result pipe are their length and then JSON
GARBAGE = "error: the tool wrote garbage to its result channel"
RESULT, REQUEST = 3, 4  # the tool's file descriptors
FIRST_UID = 1_800_000_000  # far above the ids that systems hand out
PROCESSES, FILES, FILE_BYTES, WORK_BYTES = 16, 64, 16 << 20, 64 << 20  # per call

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << n for n in (17, 27, 28, 29, 30))
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = (1 << n for n in (0, 1, 2, 3, 12, 14, 18))
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Chain:
    """Processes that wait for a request, and the server's ends of their pipes. Used once."""

    child: int
    request: int
    result: int
    output: int
    work: str


class Server:
    """Answers the trainer's calls one after the other."""

    def __init__(self, memory: int, max_output: int):
        self.memory, self.max_output = memory, max_output
        self.trainer = socket.socket(fileno=0)
        self.trainer_process = os.pidfd_open(os.getppid())
        self.process = os.pidfd_open(os.getpid())
        self.null = os.open(os.devnull, os.O_RDWR)
        system("prctl", PR_SET_CHILD_SUBREAPER, 1)  # orphans of a call come here to be killed
        self.uid = spare_uid() if os.geteuid() == 0 else None
        self.work = enter_namespaces()
        system("prctl", PR_SET_DUMPABLE, 0)  # a tool of the same user must not read this process's memory
        for name in PRELOAD:
            importlib.import_module(name)
        gc.freeze()  # a collection in a child would touch, and so copy, every page

    def serve(self) -> None:
        """Answer until the trainer is gone. The next call's processes are made while it is busy with this answer."""
        held = ["network", "files", "processes"] if self.work else []
        self._send({"protections": [*held, *(["identity"] if self.uid is not None else [])]})
        answered = True
        while answered:
            chain = self._prepare()
            try:
                answered = (request := self._receive()) is not None and self._answer(chain, request)
            finally:
                self._clear(chain)

    def _prepare(self) -> Chain:
        work = self._open_work()
        (request, request_end), (result, result_end), (output, output_end) = os.pipe(), os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            self._become_tool(request, result_end, output_end, work)
        for end in (request, result_end, output_end):
            os.close(end)
        return Chain(child, request_end, result, output, work)

    def _clear(self, chain: Chain) -> None:
        self._kill(chain.child)
        for end in (chain.request, chain.result, chain.output):
            os.close(end)
        self._close_work(chain.work)

    def _answer(self, chain: Chain, request: dict[str, Any]) -> bool:
        """Let the tool run; False if nobody is left to answer."""
        data = json.dumps(request).encode()
        with contextlib.suppress(BrokenPipeError):  # it died while it waited, which shows below
            os.write(chain.request, LENGTH.pack(len(data)))
            while data:
                data = data[os.write(chain.request, data) :]
        text = self._watch(chain, request["timeout"])
        if text is not None:
            self._send({"text": text})
        return text is not None

    def _watch(self, chain: Chain, timeout: float) -> str | None:
        """Read what the tool reports and prints until it is done, dead or late. None: the trainer is gone."""
        deadline = time.monotonic() + timeout
        frame, printed = bytearray(), bytearray()
        poll = select.poll()
        poll.register(chain.result, select.POLLIN)
        poll.register(chain.output, select.POLLIN)
        poll.register(self.trainer_process, select.POLLIN)
        poll.register(self.trainer, 0)  # hang-up only
        while True:
            wait = deadline - time.monotonic()
            ready = {fd for fd, _ in poll.poll(math.ceil(wait * 1000))} if wait > 0 else set()
            if not ready:
                return f"error: the tool did not finish within {timeout:g} s"
            if self.trainer.fileno() in ready or self.trainer_process in ready:
                return None
            if chain.output in ready:
                chunk = os.read(chain.output, 1 << 16)
                printed += chunk[: max(0, 4 * self.max_output + 4 - len(printed))]
                if not chunk:
                    poll.unregister(chain.output)
            if chain.result in ready:
                chunk = os.read(chain.result, 1 << 16)
                frame += chunk
                if not chunk:
                    return f"error: the tool's process ended without a result{cause_of_death(chain.child)}"
                if len(frame) >= LENGTH.size:
                    size = LENGTH.unpack_from(frame)[0]
                    if size > 12 * self.max_output + 1000:  # a character is at most 12 bytes of JSON
                        return GARBAGE
                    if len(frame) >= LENGTH.size + size:
                        return self._observation(bytes(frame[LENGTH.size : LENGTH.size + size]), printed, chain.output)

    def _observation(self, frame: bytes, printed: bytearray, output: int) -> str:
        """The reported text; what the tool printed if it returned None."""
        try:
            text = json.loads(frame)
        except (ValueError, RecursionError):
            text = 0
        if text is None:
            os.set_blocking(output, False)
            with contextlib.suppress(BlockingIOError):
                while len(printed) <= 4 * self.max_output and (chunk := os.read(output, 1 << 16)):
                    printed += chunk
            text = printed.decode("utf-8", "replace").strip() or "None"
        return cut(text, self.max_output) if isinstance(text, str) else GARBAGE

    def _become_tool(self, request: int, result: int, output: int, work: str) -> NoReturn:
        """In the forked child: build the chain keeper, init, tool; the tool waits for its request. Never comes back."""
        try:
            # the pipes' own numbers are all above REQUEST: the server holds more files open
            os.dup2(result, RESULT, inheritable=False)
            os.setsid()
            die_with(self.process)
            if self.work:
                system("unshare", CLONE_NEWPID)
                keeper = os.pidfd_open(os.getpid())
                if init := os.fork():
                    mirror(init)
                die_with(keeper)
                # PID 1 of a namespace is spared signals of its own, so the tool must not be it: a tool may kill itself
                if tool := os.fork():
                    mirror(tool)
            os.chdir(work)
            self._give_up_rights()
            if not self.work:
                die_with(self.process)  # a new user id cancels the first request
            os.dup2(self.null, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(request, REQUEST)
            os.closerange(REQUEST + 1, 1 << 16)
            with open(REQUEST, "rb") as file:
                call = json.loads(file.read(LENGTH.unpack(file.read(LENGTH.size))[0]))
            limit(resource.RLIMIT_CPU, math.ceil(call["timeout"]) + 1)
            text = run(call, self.max_output)
            sys.stdout.flush()
            sys.stderr.flush()
            report(text)
        except BaseException as error:
            report(f"error: the tool's process failed: {error!r}")
        finally:
            os._exit(1)

    def _give_up_rights(self) -> None:
        limit(resource.RLIMIT_AS, self.memory)
        limit(resource.RLIMIT_FSIZE, FILE_BYTES)
        limit(resource.RLIMIT_NOFILE, FILES)
        limit(resource.RLIMIT_CORE, 0)
        if self.work or self.uid is not None:  # otherwise it would count every process of the trainer's user
            limit(resource.RLIMIT_NPROC, PROCESSES)
        os.umask(0o077)
        if self.uid is not None:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        system("capset", struct.pack("II", CAPABILITY_VERSION_3, 0), bytes(24))
        system("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        system("prctl", PR_SET_DUMPABLE, 0)

    def _open_work(self) -> str:
        """An empty folder that only this call can write: its own small file system, or else a temporary folder."""
        uid, gid = (os.geteuid(), os.getegid()) if self.uid is None else (self.uid, self.uid)
        if self.work:
            options = f"size={WORK_BYTES},nr_inodes=1024,mode=0700,uid={uid},gid={gid}"
            mount("tmpfs", self.work, "tmpfs", MS_NOSUID | MS_NODEV, options)
            return self.work
        folder = tempfile.mkdtemp(prefix="pact-tool-")
        if self.uid is not None:
            os.chown(folder, uid, gid)
        return folder

    def _close_work(self, folder: str) -> None:
        if self.work:
            system("umount2", folder.encode(), MNT_DETACH)
            return
        with contextlib.suppress(RecursionError):  # a tool may nest folders without end; rmtree recurses
            shutil.rmtree(folder, ignore_errors=True)

    def _kill(self, child: int) -> None:
        """End the call's processes, all of them, and wait until they are gone."""
        for pid in [child] if self.work else halted_descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self.trainer.sendall(LENGTH.pack(len(data)) + data)

    def _receive(self) -> dict[str, Any] | None:
        """The next request, or None when the trainer is gone."""
        head = self._read(LENGTH.size)
        body = self._read(LENGTH.unpack(head)[0]) if head else None
        return json.loads(body) if body else None

    def _read(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            # a process forked from the trainer may hold its end of the socket open, so its process is watched too
            ready, _, _ = select.select([self.trainer.fileno(), self.trainer_process], [], [])
            if self.trainer.fileno() not in ready:
                return None
            chunk = self.trainer.recv(min(size - len(data), 1 << 16))
            if not chunk:
                return None
            data += chunk
        return bytes(data)


def run(request: dict[str, Any], max_output: int) -> str | None:
    """Run the source, call the function; its result as text (None for None), or the error as text."""
    warnings.simplefilter("ignore")
    sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        random.seed(request["function"] + request["arguments"])  # the same call gives the same answer
        namespace: dict[str, Any] = {"__name__": "tool"}
        exec(compile(request["source"], "<tool>", "exec", dont_inherit=True), namespace)
        function = namespace.get(request["function"])
        if function is None:
            raise NameError(f"the source defines no function '{request['function']}'")
        value = function(**json.loads(request["arguments"]))
        return None if value is None else cut(as_text(value), max_output)
    except BaseException as error:
        return cut(f"error: {type(error).__name__}" + (f": {error}" if str(error) else ""), min(max_output, 1000))


def as_text(value: Any) -> str:
    if isinstance(value, dict | list):
        try:
            return json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError):  # keys that are not JSON, a list inside itself
            return str(value)
    text = str(value)
    if re.fullmatch(r"<.* at 0x[0-9a-f]+>", text, re.DOTALL):
        raise TypeError(f"the tool returned a {type(value).__name__}, which is not data")
    return text


def report(text: str | None) -> None:
    data = json.dumps(text).encode()
    data = LENGTH.pack(len(data)) + data
    while data:
        data = data[os.write(RESULT, data) :]


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… [cut at {limit} characters]"


def enter_namespaces() -> str:
    """Leave the network, see the file system read-only and without /proc. Returns the folder for calls.

    Root just does so; a user first takes a user namespace, where that is allowed. "" if the system refuses any of it.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        if uid != 0:
            system("unshare", CLONE_NEWUSER)
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        system("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC)
        require_pid_namespaces()
        library = os.open(os.path.dirname(os.__file__), os.O_PATH)  # /tmp may hold it, and is about to be covered
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=0755")
        os.mkdir("/tmp/library")
        os.mkdir("/tmp/work")
        # The library may lie in a folder that the tool's user cannot enter
        mount(f"/proc/self/fd/{library}", "/tmp/library", None, MS_BIND | MS_REC)
        attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
        system("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
        mount("tmpfs", "/proc", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,mode=0555")
        os.close(library)
    except OSError:
        return ""
    import_from(os.path.dirname(os.__file__), "/tmp/library")
    return "/tmp/work"


def import_from(old: str, new: str) -> None:
    """Let modules that are imported from now on come from `new`, those of packages that are already loaded too."""
    sys.path[:] = [new, f"{new}/lib-dynload"]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if path := getattr(module, "__path__", None):
            module.__path__ = [folder.replace(old, new, 1) for folder in path]


def require_pid_namespaces() -> None:
    """OSError unless a child may make a PID namespace (tried in a child, since it cannot be undone)."""
    child = os.fork()
    if child == 0:
        os._exit(libc.unshare(CLONE_NEWPID) != 0)
    if os.waitpid(child, 0)[1]:
        raise PermissionError("no PID namespaces")


def spare_uid() -> int | None:
    """A user id that nobody has, another for each server: the process limit then counts one tool's processes only."""
    uid = FIRST_UID + os.getpid()
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    for candidate in (uid, 65534):  # 65534 is nobody; a container may know no high ids
        if any(first <= candidate < first + count for first, _, count in ranges):
            return candidate
    return None


def die_with(process: int) -> None:
    """Be killed when the parent (a pidfd) dies, even if that was a moment ago."""
    system("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([process], [], [], 0)[0]:
        os._exit(1)


def mirror(child: int) -> NoReturn:
    """Wait for the child, reaping orphans, and end as it did."""
    os.closerange(0, 1 << 16)  # the pipes above all: their end must show when the tool is gone
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def cause_of_death(child: int) -> str:
    """` (SIGKILL)` if the child, or the process that it mirrors, died of a signal just now; otherwise nothing."""
    process = os.pidfd_open(child)
    try:
        if not select.select([process], [], [], 0.2)[0]:
            return ""
        status = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    finally:
        os.close(process)
    assert status is not None
    number = status.si_status if status.si_code != os.CLD_EXITED else status.si_status - 128
    return f" ({signal.Signals(number).name})" if number in signal.valid_signals() else ""


def halted_descendants() -> list[int]:
    """All processes below this one, stopped. Killing them at once would make room for a fork bomb's next ones."""
    halted: list[int] = []
    queue = children(os.getpid())
    while queue:
        for pid in queue:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        halted += queue
        found = [pid for parent in [os.getpid(), *halted] for pid in children(parent)]
        queue = [pid for pid in found if pid not in halted]
    return halted


def children(process: int) -> list[int]:
    """Children of all the process's threads; none if it is gone."""
    pids: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                pids += map(int, file.read().split())
    return pids


def limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    system("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def system(name: str, *arguments: Any) -> None:
    """Call a C function that returns 0 for success; OSError otherwise."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    Server(memory=int(sys.argv[1]) << 20, max_output=int(sys.argv[2])).serve()
