"""Calls in bubblewrap (`bwrap`, https://github.com/containers/bubblewrap) instead of namespaces that we make ourselves.

Each call is a new Python in a new sandbox, started in advance; that takes many times as long as a fork.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys

from . import namespaces, tool
from .leftovers import end_descendants
from .settings import WORK_BYTES, Settings
from .zygote import Call, SystemProbe, usable_filter

CODE = "/tmp/worker"


class Bubblewrap:
    """Starts each call with bwrap.

    Raises:
        SystemExit: bwrap is not installed, or does not run here.
    """

    def __init__(self, settings: Settings, probe: SystemProbe):
        self.settings = settings
        program = shutil.which("bwrap", path=os.defpath)
        if program is None:
            raise SystemExit("env.args.sandbox=bubblewrap: install the package bubblewrap, there is no `bwrap`")
        self.command = [program, *arguments(), python(), "-P", "-s", "-S", "-B", "-X", "utf8"]
        trial = subprocess.run([*self.command, "-c", ""], stdin=subprocess.DEVNULL, capture_output=True)
        if trial.returncode:
            reason = trial.stderr.decode("utf-8", "replace").strip().splitlines()
            raise SystemExit(f"env.args.sandbox=bubblewrap: {reason[-1] if reason else 'bwrap failed without a word'}")
        self.group: str | None = None
        filtered = ["keys", "sockets"] if probe.code else []
        identity = ["identity"] if settings.uid is not None else []
        self.protections = ["network", "files", "devices", "processes", "ipc", *filtered, "count", *identity]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Call:
        (request, request_end), (result, result_end), (output, output_end) = os.pipe(), os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (request, result_end)]
        settings = json.dumps(dataclasses.asdict(self.settings))
        self.process = subprocess.Popen(
            [*self.command, CODE, "tool", settings, *map(str, theirs)],
            stdin=subprocess.DEVNULL,
            stdout=output_end,
            stderr=output_end,
            pass_fds=theirs,
            start_new_session=True,
        )
        for end in (request, result_end, output_end, *theirs):
            os.close(end)
        return Call(self.process.pid, (request_end, result, output), namespaces.WORK)

    def signal_of_death(self, call: Call) -> int:
        return 0  # bwrap's own status does not tell a signal from an exit status

    def end(self, call: Call) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()
        end_descendants(None)  # bwrap's init dies with it, but not while it is still setting itself up


def python() -> str:
    """The interpreter's own path: that of a virtual environment may be a link into a folder that is covered."""
    return os.path.realpath(sys.executable)


def arguments() -> list[str]:
    """Options of bwrap for the same isolation as `namespaces.enter`."""
    root = os.geteuid() == 0  # the tool's process sets its own user id, after Python has started
    kinds = ["--unshare-pid", "--unshare-net", "--unshare-ipc", *([] if root else ["--unshare-user"])]
    rights = ["--cap-drop", "ALL", *(["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else [])]
    library, here = os.path.dirname(os.__file__), os.path.dirname(os.path.abspath(__file__))
    folders = ["--ro-bind", "/", "/", "--dev", "/dev", "--remount-ro", "/dev", "--tmpfs", "/tmp"]
    for source, target in ((sys.base_prefix, sys.base_prefix), (library, namespaces.LIBRARY), (here, CODE)):
        folders += ["--ro-bind", source, target]
    work = ["--perms", "0777", "--size", str(WORK_BYTES), "--tmpfs", namespaces.WORK, "--chdir", namespaces.WORK]
    covered = ["--remount-ro", "/tmp", "--tmpfs", "/proc", "--remount-ro", "/proc"]
    return [*kinds, *rights, "--die-with-parent", *folders, *work, *covered, "--"]


def main(argv: list[str]) -> None:
    """The tool's process inside the sandbox. Arguments: settings, and the descriptors of request and result."""
    settings, request, result = Settings(**json.loads(argv[0])), int(argv[1]), int(argv[2])
    tool.preload()
    namespaces.redirect_imports(os.path.dirname(os.__file__), namespaces.LIBRARY)
    code = usable_filter()
    null, output = os.open(os.devnull, os.O_RDWR), os.dup(1)
    os.dup2(result, tool.RESULT, inheritable=False)
    tool.drop_privileges(settings, code, count_processes=True)
    tool.arrange_descriptors(null, request, output)
    tool.serve(settings)
