"""Removal of a call's leftovers if no namespace removes them: processes, folders, shared files."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time

from .linux import drop_capabilities

ROUNDS = 4  # of looking for descendants before those that were found are killed
SHARED_FOLDERS = ("/dev/shm", "/tmp", "/var/tmp")  # where any user may write


def end_descendants(own_uid: int | None, seconds: float = 10.0) -> None:
    """Kill all descendants of this process and reap them. Returns when none is left.

    This process must be a subreaper: orphans become its children, so if it has no child, it has no descendant either.
    That is what tells the end; a list of processes that fork and exit is out of date when it is read.

    Args:
        own_uid: The user id of the descendants if no other process has it.
        seconds: TimeoutError after these.
    """
    deadline = time.monotonic() + seconds
    while _reap():
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes of a tool could not be killed within {seconds:g} s")
        if own_uid is not None:
            _kill_all_of(own_uid)
        for pid in _stop_descendants():
            _kill(pid, signal.SIGKILL)
        time.sleep(0.0002)  # they take a moment to die


def remove_files_of(own_uid: int) -> None:
    """Remove the user's files from world-writable folders, including /dev/shm, which takes memory."""
    for folder in SHARED_FOLDERS:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid != own_uid:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        remove_tree(entry.path)
                    else:
                        os.unlink(entry.path)


def remove_tree(folder: str) -> None:
    """Remove a folder of any depth and with any modes. Errors are ignored: another process may help.

    A folder is moved up before it is emptied, so that paths stay short and nothing recurses.
    """
    names, prefix = itertools.count(), f"{folder}/{os.urandom(8).hex()}"
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)
    todo = [folder]
    while todo:
        inner = todo.pop()
        with contextlib.suppress(OSError):
            with os.scandir(inner) as scan:
                entries = list(scan)
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        os.chmod(entry.path, 0o700)  # a folder that cannot be written cannot be moved
                        moved = f"{prefix}-{next(names)}"
                        os.rename(entry.path, moved)
                        todo.append(moved)
                    else:
                        os.unlink(entry.path)
            if inner != folder:
                os.rmdir(inner)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _reap() -> bool:
    """Reap children that have ended; whether there are others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return True
    except ChildProcessError:
        return False


def _kill_all_of(own_uid: int) -> None:
    """Kill all processes of the user at once: the kernel lets none of them fork meanwhile."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(own_uid, own_uid, own_uid)
            os.setresuid(own_uid, own_uid, own_uid)
            drop_capabilities()
            if os.getresuid() == (own_uid, own_uid, own_uid) and own_uid > 0:  # or it would kill the whole machine
                os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    end = time.monotonic() + 0.2
    while os.waitpid(child, os.WNOHANG)[0] == 0:  # a process of the user may have killed or stopped it
        if time.monotonic() > end:
            _kill(child, signal.SIGKILL)
        time.sleep(0.0005)


def _stop_descendants() -> set[int]:
    """Stop the descendants of this process and return them. Killing them one by one would let a fork bomb refill.

    Chains of processes that fork and exit are never all found. The rounds are few, so that the dead are reaped meanwhile:
    tens of thousands of them would make every look at the children slower than the chains.
    """
    stopped: set[int] = set()
    for _ in range(ROUNDS):
        found = {pid for parent in (os.getpid(), *stopped) for pid in _child_pids(parent)} - stopped
        if not found:
            break
        for pid in found:
            _kill(pid, signal.SIGSTOP)
        stopped |= found
    return stopped


def _child_pids(process: int) -> list[int]:
    """Child pids of a process, over all its threads; empty if it is gone."""
    pids: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                pids += map(int, file.read().split())
    return pids


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
