"""The six situations in which tool workers run, and a Python that starts in each of them.

root              with all rights
root-container    without CAP_SYS_ADMIN, as in a default container
root-old-kernel   before Linux 5.12: no mount_setattr
user              another user, who may make user namespaces
user-plain        another user, who may not
user-cgroup       the same in a cgroup that belongs to the user

`interpreter` writes a script that stands in for sys.executable; it runs this file, which enters the situation.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import tempfile
from pathlib import Path

CONTEXTS = ("root", "root-container", "root-old-kernel", "user", "user-plain", "user-cgroup")
WITH_NAMESPACES = ("root", "user")
USER = 1_700_000_001  # nobody has it
# capabilities that Docker leaves to root by default
KEPT = {"chown": 0, "dac_override": 1, "fowner": 3, "fsetid": 4, "kill": 5, "setgid": 6, "setuid": 7, "setpcap": 8,
        "net_bind_service": 10, "net_raw": 13, "sys_chroot": 18, "mknod": 27, "audit_write": 29, "setfcap": 31}  # fmt: skip
MOUNT_SETATTR = 442
UNSHARE = {"x86_64": 272, "aarch64": 97}
ENOSYS, EPERM = 38, 1
REAL = sys.executable  # tests replace it
libc = ctypes.CDLL(None, use_errno=True)


def missing(context: str) -> str | None:
    """Why this machine cannot play the situation; None if it can."""
    if os.geteuid() != 0:
        return f"{context} is entered as root"
    if os.uname().machine not in UNSHARE:
        return "numbers of system calls are known for x86-64 and ARM64 only"
    if context == "user-cgroup" and not os.access(delegated("x").parent / "tasks", os.W_OK):
        return "user-cgroup is entered where there are cgroups of version 1 with the controller pids"
    child = os.fork()
    if child == 0:
        os._exit(libc.unshare(0x00020000) != 0)
    if os.waitpid(child, 0)[1]:
        return f"{context} is entered with CAP_SYS_ADMIN, which root does not have here"
    return None


def interpreter(context: str, folder: Path) -> Path:
    """A stand-in for sys.executable. `folder`: an empty one that every user can enter, as long as it is used."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {REAL} -S {__file__} {context} {folder} "$@"\n')
    script.chmod(0o755)
    return script


def public_folder() -> Path:
    """A new folder that every user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-context-", dir="/tmp"))
    folder.chmod(0o755)
    return folder


def delegated(name: str) -> Path:
    """The cgroup of this name with the controller `pids`, version 1, below that of this process."""
    lines = (line.rstrip("\n").split(":", 2) for line in open("/proc/self/cgroup"))  # noqa: SIM115
    path = next((path for _, controllers, path in lines if controllers == "pids"), "/")
    return Path("/sys/fs/cgroup/pids") / path.lstrip("/") / name


def call(name: str, *arguments: object) -> None:
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


def refuse(number: int, error: int) -> None:
    """Refuse a system call from now on, by a filter that has nothing in common with the sandbox's."""
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    call("prctl", 22, 2, struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)), 0, 0)


def enter(context: str, folder: Path, command: list[str]) -> list[str]:
    """Enter the situation. Returns the command with paths that the user can read."""
    if context == "root-container":
        for number in set(range(41)) - set(KEPT.values()):
            libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP; takes effect at exec
    if context == "root-old-kernel":
        refuse(MOUNT_SETATTR, ENOSYS)
    if not context.startswith("user"):
        return [os.path.realpath(sys.executable), *command]
    call("unshare", 0x00020000)
    call("mount", None, b"/", None, ctypes.c_ulong(1 << 18 | 1 << 14), None)
    worker = next((part for part in command if part.endswith("python_tools/worker")), None)
    for source, name in ((sys.base_prefix, "prefix"), (worker, "worker")):
        if source:
            (folder / name).mkdir(exist_ok=True)
            call("mount", source.encode(), str(folder / name).encode(), None, ctypes.c_ulong(1 << 12 | 1 << 14), None)
    python = os.path.realpath(sys.executable).replace(sys.base_prefix, str(folder / "prefix"), 1)
    if context == "user-cgroup":
        group = delegated(folder.name)
        group.mkdir(exist_ok=True)  # every worker of a pool enters
        (group / "cgroup.procs").write_text("0")
        os.chown(group, USER, USER)
    if context in ("user-plain", "user-cgroup"):
        refuse(UNSHARE[os.uname().machine], EPERM)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    return [python, *(str(folder / "worker") if part == worker else part for part in command)]


if __name__ == "__main__":
    final = enter(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    os.execv(final[0], final)
