"""How one of several processes ends."""

from __future__ import annotations

import atexit
import os
import sys


def skip_teardown_exit(status: int) -> None:
    """End the process, if it is one of several, without taking its connections down.

    gloo's threads may still wait for a peer then; torch 2.13 destroys them as they are, and now and then the process aborts,
    after all its work, and the launcher calls the run a failure.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
