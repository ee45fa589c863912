"""System calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import struct
from collections.abc import Callable
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << n for n in (17, 27, 28, 29, 30))
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = (1 << n for n in (0, 1, 2, 3, 12, 14, 18))
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NODEV = 442, -100, 0x8000, 1, 4
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def libc_call(name: str, *arguments: Any) -> None:
    """Call a function of libc that returns 0 for success; OSError otherwise."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    libc_call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def set_mount_attributes(path: str, set_: int, clear: int = 0, *, recursive: bool = False) -> None:
    """OSError before Linux 5.12."""
    attributes = struct.pack("QQQQ", set_, clear, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(len(attributes))
    libc_call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, size)


def set_limit(kind: int, value: int) -> None:
    """Set a resource limit, at most the hard limit that holds already."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def drop_capabilities() -> None:
    libc_call("capset", struct.pack("II", CAPABILITY_VERSION_3, 0), bytes(24))


def set_pdeathsig(parent: int) -> None:
    """Have this process killed when its parent (a pidfd) dies; exit if it is dead already."""
    libc_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([parent], [], [], 0)[0]:
        os._exit(1)


def works_in_child(action: Callable[[], Any]) -> bool:
    """Whether the system allows an action that cannot be undone. Tried in a child."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
