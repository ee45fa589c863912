"""Modules of tests.support in processes of their own, alone or as the ranks of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which Python finds `tests` and `benchmarks` of this checkout from any folder."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)} | variables


def run_module(module: str, *arguments: str, ranks: int = 1, timeout: float = 600, **variables: str) -> str:
    """Standard output of `python -m module`, or of torchrun's `ranks` processes. They must end with status 0."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [sys.executable, "-m", *(launcher if ranks > 1 else []), module, *arguments]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
