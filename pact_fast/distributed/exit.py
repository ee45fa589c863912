"""Ending a process that is one of several ranks."""

from __future__ import annotations

import atexit
import os
import sys


def skip_teardown_exit(status: int) -> None:
    """End the process with `status` without destroying its process groups. Returns if the run has a single rank.

    With torch 2.13, destroying a process group while gloo's threads still wait for a peer occasionally aborts the
    process after all its work is done, and the launcher then reports a failed run.
    """
    dist = sys.modules.get("torch.distributed")  # not imported, if the command did not need it
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    atexit._run_exitfuncs()  # os._exit skips them
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
