"""The fork server of a pool: starts Python once, tests once which isolation the system allows, and forks every worker.

It sees no request and no answer. When it is gone, its workers continue, and the trainer starts another one.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import traceback
from typing import NoReturn

from . import supervisor, tool
from .frames import PID, START
from .linux import PR_SET_DUMPABLE, libc_call
from .zygote import SystemProbe, probe_system


def main(argv: list[str]) -> None:
    """Serve on descriptor 0 until the trainer is gone. Arguments: see `supervisor.main`.

    Each message START brings two descriptors: the worker's socket to the trainer, and its standard error.
    """
    control = socket.socket(fileno=0)
    trainer = os.pidfd_open(os.getppid())
    tool.preload()
    probe = probe_system(argv[2])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
    libc_call("prctl", PR_SET_DUMPABLE, 0)  # a tool of the same user must not change the parent of the workers
    while True:
        # watch the trainer's process, too: a process that it forked may hold its end of the socket open
        ready, _, _ = select.select([control.fileno(), trainer], [], [])
        if control.fileno() not in ready:
            return
        message, ends, *_ = socket.recv_fds(control, 16, 2)
        if message != START or len(ends) != 2:
            return
        if os.fork() == 0:
            control.close()
            _become_worker(ends, trainer, argv, probe)
        for end in ends:
            os.close(end)


def _become_worker(ends: list[int], trainer: int, argv: list[str], probe: SystemProbe) -> NoReturn:
    """In the forked child: tell the trainer the process, with its pid and a descriptor of it, and serve."""
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for source, target in zip(ends, (0, 2), strict=True):
            os.dup2(source, target)
            os.close(source)
        libc_call("prctl", PR_SET_DUMPABLE, 1)  # until it has made its namespaces, which /proc/self belongs to
        process = os.pidfd_open(os.getpid())
        with socket.socket(fileno=os.dup(0)) as to_trainer:
            socket.send_fds(to_trainer, [PID.pack(os.getpid())], [process])
        os.close(process)
        supervisor.main(argv, trainer, probe)
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)
