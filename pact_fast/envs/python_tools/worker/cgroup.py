"""A cgroup of the worker's own, where the system lets it make one: it bounds the processes of a call.

The user's limit of processes does the same where the user has no processes but the call's. This is for all other cases.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator

from .linux import works_in_child


def make_group(name: str, processes: int) -> str | None:
    """The folder of a new cgroup with a limit of processes (controller `pids`, version 1 or 2).

    None if this process may make none, or may not put a process there, or the controller is not at hand.
    """
    for parent in _own_groups():
        folder = f"{parent}/{name}"
        with contextlib.suppress(OSError):
            os.mkdir(folder)
            if limit_group(folder, processes) and works_in_child(functools.partial(join_group, folder)):
                return folder
        _remove(folder)
    return None


def join_group(folder: str) -> None:
    """Put this process, and so all that it starts, into the cgroup. OSError if that is not allowed."""
    with open(f"{folder}/cgroup.procs", "w") as file:
        file.write("0")  # the process that writes


def limit_group(folder: str, processes: int) -> bool:
    """Let at most so many processes be in the cgroup: none can start another one once there are. Whether that is possible."""
    try:
        with open(f"{folder}/pids.max", "r+") as file:  # never creates it
            file.write(str(processes))
    except OSError:
        return False
    return True


def remove_group(folder: str | None, seconds: float = 1.0) -> None:
    """Remove the group of `make_group`. The processes in it must be gone, or about to be."""
    end = time.monotonic() + seconds
    while folder and not _remove(folder) and time.monotonic() < end:
        time.sleep(0.001)


def _remove(folder: str) -> bool:
    """Whether the folder is gone."""
    with contextlib.suppress(OSError):
        os.rmdir(folder)
    return not os.path.exists(folder)


def _own_groups() -> Iterator[str]:
    """Folders of the cgroups of this process that may count processes."""
    with contextlib.suppress(OSError):
        with open("/proc/self/cgroup") as file:
            paths = [line.rstrip("\n").split(":", 2) for line in file]
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
        for _, controllers, path in paths:
            for fields in mounts:
                root, point, (kind, _, options) = fields[3], fields[4], fields[fields.index("-") + 1 :]
                first = kind == "cgroup" and "pids" in controllers.split(",") and "pids" in options.split(",")
                second = kind == "cgroup2" and not controllers
                if (first or second) and f"{path}/".startswith(root.rstrip("/") + "/"):
                    yield f"{point}/{path[len(root.rstrip('/')) :].lstrip('/')}".rstrip("/")
