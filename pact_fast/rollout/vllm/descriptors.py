"""Limit of connections per process: the system's limit of open files, raised as far as possible."""

from __future__ import annotations

import os
import resource

MAX_OPEN = 8192  # turns; as many as a large data-parallel server works on at once
KEPT_FREE = 64  # descriptors for everything else that is opened meanwhile
WANTED = MAX_OPEN + 1024


def open_request_limit() -> int:
    """Requests that may be open at a time, at least 8.

    The soft limit of open files is raised first, up to the hard limit: many systems begin with 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return MAX_OPEN
    return max(8, min(MAX_OPEN, soft - _open_files() - KEPT_FREE))


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # not Linux
        return 256
