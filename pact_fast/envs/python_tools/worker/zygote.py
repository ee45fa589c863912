"""The zygote: starts the processes of each call in advance, and ends them. It sees no request and no answer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import NoReturn, Protocol

from . import namespaces, seccomp, tool
from .cgroup import join_group, limit_group, make_group, remove_group
from .leftovers import end_descendants, remove_files_of, remove_tree
from .linux import (
    MNT_DETACH,
    MS_NODEV,
    MS_NOSUID,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    libc_call,
    mount,
    set_pdeathsig,
    works_in_child,
)
from .settings import PROCESSES, WORK_BYTES, Settings

END, CAUSE = b"end", b"cause"  # messages of the supervisor
CALL = b"call"  # message of the zygote, with a call's descriptors


@dataclass(frozen=True)
class Call:
    """The processes that wait for one call.

    child    pid of the zygote's child: the reaper, or the tool
    pipes    the supervisor's ends: where it writes the request, where it reads the result frame, and the output
    work     working folder of the call
    """

    child: int
    pipes: tuple[int, int, int]
    work: str


@dataclass(frozen=True)
class SystemProbe:
    """Isolation that the system allows, tested once for all workers of a fork server; each worker applies it.

    isolated  `namespaces.enter` succeeds
    code      the filter of system calls; None if the system takes none
    """

    isolated: bool
    code: bytes | None


class Launcher(Protocol):
    """Starts and ends the processes of calls.

    protections  names in force
    group        folder of the cgroup of calls, if they have one
    """

    protections: list[str]
    group: str | None

    def start(self) -> Call: ...

    def signal_of_death(self, call: Call) -> int:
        """Number of the signal that ended the tool; 0 if none did, or it is not known."""

    def end(self, call: Call) -> None:
        """End all processes of the call and remove its folder."""


class ForkLauncher:
    """Forks the processes: reaper, init and tool in namespaces of their own, or the tool alone."""

    def __init__(self, settings: Settings, probe: SystemProbe):
        self.settings = settings
        self.process = os.pidfd_open(os.getpid())
        self.null = os.open(os.devnull, os.O_RDWR)
        self.isolated = probe.isolated
        if self.isolated:
            namespaces.enter()  # a worker that cannot does not start: it would protect less than the others
            namespaces.redirect_imports(os.path.dirname(os.__file__), namespaces.LIBRARY)
        libc_call("prctl", PR_SET_DUMPABLE, 0)  # a tool of the same user must not read this process's memory
        self.code = probe.code
        self.own_user = self.isolated or settings.uid is not None  # which has no processes but the call's
        self.group = None if self.own_user else make_group(os.path.basename(settings.folder), PROCESSES)
        self.protections = [
            *(["network", "files", "devices", "processes"] if self.isolated else []),
            *(["ipc"] if self.isolated or self.code else []),
            *(["keys", "sockets"] if self.code else []),
            *(["count"] if self.own_user or self.group else []),
            *(["identity"] if settings.uid is not None else []),
        ]
        tool.preload()

    def start(self) -> Call:
        work = self._open_work()
        (request, request_end), (result, result_end), (output, output_end) = os.pipe(), os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            self._run_child(request, result_end, output_end, work)
        for end in (request, result_end, output_end):
            os.close(end)
        return Call(child, (request_end, result, output), work)

    def signal_of_death(self, call: Call) -> int:
        process = os.pidfd_open(call.child)
        try:
            if not select.select([process], [], [], 0.2)[0]:
                return 0
            status = os.waitid(os.P_PID, call.child, os.WEXITED | os.WNOWAIT)
        finally:
            os.close(process)
        assert status is not None
        if status.si_code != os.CLD_EXITED:
            return status.si_status
        return max(0, status.si_status - 128) if self.isolated else 0  # the reaper forwards it

    def end(self, call: Call) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(call.child, signal.SIGKILL)
        if self.isolated:
            with contextlib.suppress(ChildProcessError):
                while True:  # init, too, which the reaper's death has killed
                    os.waitpid(-1, 0)
            libc_call("umount2", call.work.encode(), MNT_DETACH)
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(call.child, 0)
        if self.group:
            limit_group(self.group, 0)  # processes that hand on by forking cannot outrun the end
        end_descendants(self.settings.own_uid)
        if self.group:
            limit_group(self.group, PROCESSES)
        remove_tree(call.work)
        if self.settings.own_uid is not None:
            remove_files_of(self.settings.own_uid)

    def _run_child(self, request: int, result: int, output: int, work: str) -> NoReturn:
        """In the forked child: fork init and the tool, which waits for its request and runs it."""
        try:
            # dup2 overwrites no pipe: their descriptors are above REQUEST, since the zygote has more files open
            os.dup2(result, tool.RESULT, inheritable=False)
            os.setsid()
            set_pdeathsig(self.process)
            if self.isolated:
                libc_call("unshare", namespaces.CALL_NAMESPACES)
                reaper = os.pidfd_open(os.getpid())
                if init := os.fork():
                    forward_exit(init)
                set_pdeathsig(reaper)
                # the tool must not be PID 1, which ignores signals from its own namespace: a tool may kill itself
                if child := os.fork():
                    forward_exit(child, 127)
            os.chdir(work)
            if self.group:
                join_group(self.group)
            tool.drop_privileges(self.settings, self.code, count_processes=self.own_user)
            if not self.isolated:
                set_pdeathsig(self.process)  # setresuid has cleared the first one
            tool.arrange_descriptors(self.null, request, output)
        except BaseException as error:
            tool.report(f"error: the tool's process failed: {error!r}")
            os._exit(1)
        tool.serve(self.settings)

    def _open_work(self) -> str:
        """The working folder of a call, empty: a tmpfs of its own, or else a temporary folder."""
        uid = self.settings.uid
        uid, gid = (os.geteuid(), os.getegid()) if uid is None else (uid, uid)
        if self.isolated:
            options = f"size={WORK_BYTES},nr_inodes=1024,mode=0700,uid={uid},gid={gid}"
            mount("tmpfs", namespaces.WORK, "tmpfs", MS_NOSUID | MS_NODEV, options)
            return namespaces.WORK
        folder = f"{self.settings.folder}/{os.urandom(8).hex()}"
        os.mkdir(folder, 0o700)
        if self.settings.uid is not None:
            os.chown(folder, uid, gid)
        return folder


def probe_system(sandbox: str) -> SystemProbe:
    """Test in child processes which isolation the system allows for workers that start here."""
    return SystemProbe(sandbox == "namespaces" and works_in_child(namespaces.enter), usable_filter())


def usable_filter() -> bytes | None:
    """The filter of system calls; None if the system takes none."""
    code = seccomp.program()
    return code if code and works_in_child(lambda: seccomp.install(code)) else None


def forward_exit(child: int, highest: int = 255) -> NoReturn:
    """Wait for the child, reap orphans, and exit with 128 + the signal that killed the child, or with its status.

    `highest`: the largest status that is forwarded; 127 for one that the tool chooses, which must not look like a signal.
    """
    os.closerange(0, 1 << 16)  # the pipes above all: they must close when the tool is gone
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else min(os.WEXITSTATUS(status), highest))


def start_zygote(settings: Settings, probe: SystemProbe) -> tuple[int, socket.socket]:
    """Fork the zygote. Returns its pid, and the socket to it.

    Its first message there is the JSON of the launcher's protections and group. Then it sends the descriptors of a call
    (CALL), and again after each END. It exits when the socket closes.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    launcher: Launcher | None = None
    try:
        ours.close()
        libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # orphans of a call become children, which `end` finds
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)  # the trainer's socket
        os.close(null)
        launcher = _launcher(settings, probe)
        _serve(theirs, launcher)
    except SystemExit as error:
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        if launcher:
            remove_group(launcher.group)
        remove_tree(settings.folder)
        os._exit(0)


def _launcher(settings: Settings, probe: SystemProbe) -> Launcher:
    if settings.sandbox == "bubblewrap":
        from .bubblewrap import Bubblewrap

        return Bubblewrap(settings, probe)
    return ForkLauncher(settings, probe)


def _serve(supervisor: socket.socket, launcher: Launcher) -> None:
    """Start and end calls until the supervisor is gone."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is gone
        supervisor.send(json.dumps({"protections": launcher.protections, "group": launcher.group}).encode())
        said = END
        while said == END:
            call = launcher.start()
            try:
                socket.send_fds(supervisor, [CALL], call.pipes)
                for end in call.pipes:
                    os.close(end)
                while (said := supervisor.recv(16)) == CAUSE:
                    supervisor.send(bytes([launcher.signal_of_death(call)]))
            finally:
                launcher.end(call)
