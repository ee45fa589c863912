"""Sandbox worker: runs each call of an untrusted tool in a fresh, limited process.

Covered on every Linux machine (5.3 or newer):

- A call that loops, sleeps, crashes, exits, or floods its output ends with an error text within its time limit.
- CPU time, wall time, address space, file size and the number of open files are limited.
- A call starts in an empty folder, with no environment variables, no open files, no input and no memory of
  earlier calls.
- Processes that a call started are killed when it ends.

Covered only where the system allows it (SandboxPool.protections says so):

- Network access, and writing outside the folder of the call (namespaces).
- Seeing or signalling processes outside the call (namespaces).
- Reading files of the trainer's user, and killing the trainer (a user id of its own, if the trainer is root).
- Fork bombs beyond the user's own process limit (namespaces, or a user id of its own).

Not covered:

- Reading files that the process may read, and returning their contents.
- Local services reached through socket files.
- Memory of a whole call: each of its processes may use the limit.
- Attacks on the kernel, and timing of other processes.

So it contains accidents and clumsy tools; it is not a security boundary.

`pact_fast.envs.python_tools.pool` runs this file as a script. It uses the standard library only, nothing of this
package.

    trainer ─ socket ─ server ─ fork ─ reaper ─ fork ─ init ─ fork ─ tool
                       (one per worker)        (a new PID namespace, if the system allows it)

The server imports the common modules once. It forks the other three processes in advance; they wait for a request and
serve one call. The tool process runs the untrusted source and writes one frame to a pipe; the server validates whatever
it reads there. After the answer, the server kills the reaper. Its death kills init, and with init the kernel kills all
that the tool left in its namespace. Without namespaces the tool is the server's own child, and the server kills all its
descendants.
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

# Modules that tools commonly use, imported before any fork. Each one makes every fork slower; tools may import others.
# fmt: off
PRELOAD = (
    "_strptime", "base64", "bisect", "calendar", "cmath", "collections.abc", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "json", "math", "operator", "random",
    "re", "statistics", "string", "time", "typing", "unicodedata", "uuid", "zoneinfo",
)
# fmt: on

LENGTH = struct.Struct("!I")  # a message on the socket or the result pipe is its length, then JSON
GARBAGE = "error: the tool wrote garbage to its result channel"
RESULT, REQUEST = 3, 4  # the tool's file descriptors
FIRST_UID = 1_800_000_000  # far above the ids that systems assign
PROCESSES, FILES, FILE_BYTES, WORK_BYTES = 16, 64, 16 << 20, 64 << 20  # per call

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << n for n in (17, 27, 28, 29, 30))
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = (1 << n for n in (0, 1, 2, 3, 12, 14, 18))
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class ProcessChain:
    """Forked processes that serve one call: reaper, init and tool, or the tool alone.

    child    pid of the server's child: the reaper, or the tool
    request  file descriptor to which the server writes the request
    result   file descriptor from which it reads the result frame
    output   file descriptor from which it reads stdout and stderr
    work     working folder of the call
    """

    child: int
    request: int
    result: int
    output: int
    work: str


class Server:
    """Serves the trainer's calls one after the other."""

    def __init__(self, memory: int, max_output: int):
        self.memory, self.max_output = memory, max_output
        self.trainer = socket.socket(fileno=0)
        self.trainer_process = os.pidfd_open(os.getppid())
        self.process = os.pidfd_open(os.getpid())
        self.null = os.open(os.devnull, os.O_RDWR)
        libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # orphans of a call become children, which _kill finds
        self.uid = unused_uid() if os.geteuid() == 0 else None
        self.work = enter_namespaces()
        libc_call("prctl", PR_SET_DUMPABLE, 0)  # a tool of the same user must not read this process's memory
        for name in PRELOAD:
            importlib.import_module(name)
        gc.freeze()  # a garbage collection in a child would write to, and so copy, every page

    def serve(self) -> None:
        """Serve until the trainer is gone. The next call's processes are forked while the trainer reads this answer."""
        protections = ["network", "files", "processes"] if self.work else []
        self._send({"protections": [*protections, *(["identity"] if self.uid is not None else [])]})
        answered = True
        while answered:
            chain = self._fork_chain()
            try:
                answered = (request := self._receive()) is not None and self._serve_call(chain, request)
            finally:
                self._clean_up(chain)

    def _fork_chain(self) -> ProcessChain:
        work = self._open_work()
        (request, request_end), (result, result_end), (output, output_end) = os.pipe(), os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            self._run_child(request, result_end, output_end, work)
        for end in (request, result_end, output_end):
            os.close(end)
        return ProcessChain(child, request_end, result, output, work)

    def _clean_up(self, chain: ProcessChain) -> None:
        self._kill(chain.child)
        for end in (chain.request, chain.result, chain.output):
            os.close(end)
        self._close_work(chain.work)

    def _serve_call(self, chain: ProcessChain, request: dict[str, Any]) -> bool:
        """Run the tool and send its observation; False if the trainer is gone."""
        data = json.dumps(request).encode()
        with contextlib.suppress(BrokenPipeError):  # the tool died while it waited; _wait_for_result reports it
            os.write(chain.request, LENGTH.pack(len(data)))
            while data:
                data = data[os.write(chain.request, data) :]
        text = self._wait_for_result(chain, request["timeout"])
        if text is not None:
            self._send({"text": text})
        return text is not None

    def _wait_for_result(self, chain: ProcessChain, timeout: float) -> str | None:
        """Read the tool's result and output until it is done, dead or late. None: the trainer is gone."""
        deadline = time.monotonic() + timeout
        frame, printed = bytearray(), bytearray()
        poll = select.poll()
        poll.register(chain.result, select.POLLIN)
        poll.register(chain.output, select.POLLIN)
        poll.register(self.trainer_process, select.POLLIN)
        poll.register(self.trainer, 0)  # no events: reports POLLHUP only
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
        """The text of a result frame; the printed text if the tool returned None."""
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
        return truncate(text, self.max_output) if isinstance(text, str) else GARBAGE

    def _run_child(self, request: int, result: int, output: int, work: str) -> NoReturn:
        """In the forked child: fork init and the tool, which waits for its request and runs it."""
        try:
            # dup2 overwrites no pipe: their descriptors are above REQUEST, since the server has more files open
            os.dup2(result, RESULT, inheritable=False)
            os.setsid()
            set_pdeathsig(self.process)
            if self.work:
                libc_call("unshare", CLONE_NEWPID)
                reaper = os.pidfd_open(os.getpid())
                if init := os.fork():
                    forward_exit(init)
                set_pdeathsig(reaper)
                # the tool must not be PID 1, which ignores signals from its own namespace: a tool may kill itself
                if tool := os.fork():
                    forward_exit(tool)
            os.chdir(work)
            self._drop_privileges()
            if not self.work:
                set_pdeathsig(self.process)  # setresuid has cleared the first one
            os.dup2(self.null, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(request, REQUEST)
            os.closerange(REQUEST + 1, 1 << 16)
            with open(REQUEST, "rb") as file:
                call = json.loads(file.read(LENGTH.unpack(file.read(LENGTH.size))[0]))
            set_limit(resource.RLIMIT_CPU, math.ceil(call["timeout"]) + 1)
            text = run(call, self.max_output)
            sys.stdout.flush()
            sys.stderr.flush()
            report(text)
        except BaseException as error:
            report(f"error: the tool's process failed: {error!r}")
        finally:
            os._exit(1)

    def _drop_privileges(self) -> None:
        set_limit(resource.RLIMIT_AS, self.memory)
        set_limit(resource.RLIMIT_FSIZE, FILE_BYTES)
        set_limit(resource.RLIMIT_NOFILE, FILES)
        set_limit(resource.RLIMIT_CORE, 0)
        if self.work or self.uid is not None:  # otherwise it would count all processes of the trainer's user
            set_limit(resource.RLIMIT_NPROC, PROCESSES)
        os.umask(0o077)
        if self.uid is not None:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        libc_call("capset", struct.pack("II", CAPABILITY_VERSION_3, 0), bytes(24))
        libc_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc_call("prctl", PR_SET_DUMPABLE, 0)

    def _open_work(self) -> str:
        """The working folder of a call, empty: a tmpfs of its own, or else a temporary folder."""
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
            libc_call("umount2", folder.encode(), MNT_DETACH)
            return
        with contextlib.suppress(RecursionError):  # rmtree recurses, and a tool may nest folders without limit
            shutil.rmtree(folder, ignore_errors=True)

    def _kill(self, child: int) -> None:
        """Kill all processes of the call and wait until they are gone."""
        for pid in [child] if self.work else stop_descendants():
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
            # watch the trainer's process, too: a process that it forked may hold its end of the socket open
            ready, _, _ = select.select([self.trainer.fileno(), self.trainer_process], [], [])
            if self.trainer.fileno() not in ready:
                return None
            chunk = self.trainer.recv(min(size - len(data), 1 << 16))
            if not chunk:
                return None
            data += chunk
        return bytes(data)


def run(request: dict[str, Any], max_output: int) -> str | None:
    """Execute the source and call the function. Returns its result or its error as text; None if it returned None."""
    warnings.simplefilter("ignore")
    sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        random.seed(request["function"] + request["arguments"])  # equal calls give equal answers
        namespace: dict[str, Any] = {"__name__": "tool"}
        exec(compile(request["source"], "<tool>", "exec", dont_inherit=True), namespace)
        function = namespace.get(request["function"])
        if function is None:
            raise NameError(f"the source defines no function '{request['function']}'")
        value = function(**json.loads(request["arguments"]))
        return None if value is None else truncate(as_text(value), max_output)
    except BaseException as error:
        return truncate(f"error: {type(error).__name__}" + (f": {error}" if str(error) else ""), min(max_output, 1000))


def as_text(value: Any) -> str:
    """A result as an observation. TypeError if its text would show a memory address, which differs between runs."""
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
    """Write the result frame."""
    data = json.dumps(text).encode()
    data = LENGTH.pack(len(data)) + data
    while data:
        data = data[os.write(RESULT, data) :]


def truncate(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… [cut at {limit} characters]"


def enter_namespaces() -> str:
    """Enter namespaces without network, with a read-only file system and an empty /proc.

    Any user but root enters a user namespace first. Returns the working folder of calls, or "" if the system refuses
    any part.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        if uid != 0:
            libc_call("unshare", CLONE_NEWUSER)
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        libc_call("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC)
        require_pid_namespaces()
        library = os.open(os.path.dirname(os.__file__), os.O_PATH)  # opened before /tmp is covered, which may hold it
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=0755")
        os.mkdir("/tmp/library")
        os.mkdir("/tmp/work")
        # bind-mounted, since it may lie in a folder that the tool's user cannot enter
        mount(f"/proc/self/fd/{library}", "/tmp/library", None, MS_BIND | MS_REC)
        attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
        libc_call(
            "syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))
        )
        mount("tmpfs", "/proc", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,mode=0555")
        os.close(library)
    except OSError:
        return ""
    redirect_imports(os.path.dirname(os.__file__), "/tmp/library")
    return "/tmp/work"


def redirect_imports(old: str, new: str) -> None:
    """Import modules from `new` from now on, submodules of loaded packages included."""
    sys.path[:] = [new, f"{new}/lib-dynload"]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if path := getattr(module, "__path__", None):
            module.__path__ = [folder.replace(old, new, 1) for folder in path]


def require_pid_namespaces() -> None:
    """OSError unless PID namespaces are allowed. Tried in a child, since unshare cannot be undone."""
    child = os.fork()
    if child == 0:
        os._exit(libc.unshare(CLONE_NEWPID) != 0)
    if os.waitpid(child, 0)[1]:
        raise PermissionError("no PID namespaces")


def unused_uid() -> int | None:
    """An unused user id, different for each server, so that the process limit counts the processes of one call."""
    uid = FIRST_UID + os.getpid()
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    for candidate in (uid, 65534):  # 65534 is nobody; a container may not map high ids
        if any(first <= candidate < first + count for first, _, count in ranges):
            return candidate
    return None


def set_pdeathsig(parent: int) -> None:
    """Have this process killed when its parent (a pidfd) dies; exit if it is dead already."""
    libc_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([parent], [], [], 0)[0]:
        os._exit(1)


def forward_exit(child: int) -> NoReturn:
    """Wait for the child, reap orphans, and exit with the child's status (128 + signal)."""
    os.closerange(0, 1 << 16)  # the pipes above all: they must close when the tool is gone
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def cause_of_death(child: int) -> str:
    """` (SIGKILL)` if the child, or the process whose exit it forwards, died of a signal; otherwise ""."""
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


def stop_descendants() -> list[int]:
    """Stop all descendants of this process and return them. Killing them one by one would let a fork bomb refill."""
    stopped: list[int] = []
    queue = child_pids(os.getpid())
    while queue:
        for pid in queue:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped += queue
        found = [pid for parent in [os.getpid(), *stopped] for pid in child_pids(parent)]
        queue = [pid for pid in found if pid not in stopped]
    return stopped


def child_pids(process: int) -> list[int]:
    """Child pids of a process, over all its threads; empty if it is gone."""
    pids: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                pids += map(int, file.read().split())
    return pids


def set_limit(kind: int, value: int) -> None:
    """Set a resource limit, at most the hard limit that holds already."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    libc_call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def libc_call(name: str, *arguments: Any) -> None:
    """Call a function of libc that returns 0 for success; OSError otherwise."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    Server(memory=int(sys.argv[1]) << 20, max_output=int(sys.argv[2])).serve()
