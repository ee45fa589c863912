"""Namespaces without network, with a read-only file system, an empty /proc and five devices."""

from __future__ import annotations

import os
import sys

from .linux import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    libc_call,
    mount,
    set_mount_attributes,
    works_in_child,
)

CALL_NAMESPACES = CLONE_NEWPID | CLONE_NEWIPC  # the others are the worker's
DEVICES = ("null", "zero", "full", "random", "urandom")
LIBRARY, WORK = "/tmp/library", "/tmp/work"


def enter() -> None:
    """Enter the worker's namespaces. Any user but root enters a user namespace first.

    Python's library is at LIBRARY then, and WORK is an empty folder to mount a call's file system on.

    Raises:
        OSError: The system refuses a part. The process is then in some of them, so try in another one first.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        libc_call("unshare", CLONE_NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    libc_call("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC)
    if not works_in_child(lambda: libc_call("unshare", CALL_NAMESPACES)):
        raise PermissionError("no PID or IPC namespaces")
    library = os.open(os.path.dirname(os.__file__), os.O_PATH)  # opened before /tmp is covered, which may hold it
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=64k,mode=0755")
    os.mkdir(LIBRARY)
    os.mkdir(WORK)
    # bind-mounted, since it may lie in a folder that the tool's user cannot enter
    mount(f"/proc/self/fd/{library}", LIBRARY, None, MS_BIND | MS_REC)
    os.close(library)
    _cover_devices()
    set_mount_attributes("/", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV, recursive=True)
    for name in DEVICES:
        set_mount_attributes(f"/dev/{name}", 0, MOUNT_ATTR_NODEV)
    mount("tmpfs", "/proc", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,mode=0555")


def _cover_devices() -> None:
    """A /dev with DEVICES only: a read-only mount would not keep a tool from its user's terminals."""
    nodes = {name: os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC, "size=64k,mode=0755")
    for name, node in nodes.items():
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY))
        mount(f"/proc/self/fd/{node}", f"/dev/{name}", None, MS_BIND)
        os.close(node)


def redirect_imports(old: str, new: str) -> None:
    """Import modules from `new` from now on, submodules of loaded packages included."""
    sys.path[:] = [new, f"{new}/lib-dynload"]
    sys.path_importer_cache.clear()
    for module in list(sys.modules.values()):
        if path := getattr(module, "__path__", None):
            module.__path__ = [folder.replace(old, new, 1) for folder in path]
