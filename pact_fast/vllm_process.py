"""Processes of vLLM servers: their start, their environment, and their end with their parent.

Shared by rollouts and by language models behind `pact_fast.llm`. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

# Loaded before any fork: between fork and exec, a process that has had threads must not import or load anything.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
# Variables that torchrun or SLURM set for the trainer; the server must not take them for its own.
LAUNCHER_VARIABLES = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING",
}  # fmt: skip
LOG_TAIL = 4000  # characters of a dead server's log that go into the error
MAX_SOCKET_PATH = 107  # bytes, of Unix
SOCKET_NAME_BYTES = 40  # of them for the names of vLLM's own sockets


class Process(Protocol):
    """The leader of a process group."""

    pid: int

    def wait(self) -> int | None: ...


def socket_folder() -> Path:
    """A private folder whose path leaves room for the names of sockets: $TMPDIR may be too long."""
    folder = Path(tempfile.mkdtemp(prefix="pact-fast-vllm-"))
    if len(os.fsencode(folder)) <= MAX_SOCKET_PATH - SOCKET_NAME_BYTES:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="pact-fast-vllm-", dir="/tmp"))


def launch(command: list[str], environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen:
    """Starts a server as the leader of a process group of its own; its output goes to `log`."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
        preexec_fn=terminate_with_parent,
    )  # fmt: skip


def command_line(args: dict[str, Any]) -> list[str]:
    """{max_model_len: 640, enable_lora: True, x: False} → --max-model-len 640 --enable-lora --no-x"""
    flags: list[str] = []
    for key, value in args.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return flags


def terminate_with_parent() -> None:
    """A trainer that is killed leaves no server behind (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def server_environment(sockets: Path, devices: list[int] | None = None) -> dict[str, str]:
    """This process's environment, without variables that its launcher has set for it alone.

    Args:
        sockets: Folder of the server's sockets.
        devices: The server's GPUs, as indices into the GPUs that this process sees; None: vLLM chooses.
    """
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_RPC_BASE_PATH": str(sockets)}
    for name in [n for n in environment if n in LAUNCHER_VARIABLES or n.startswith("TORCHELASTIC_")]:
        del environment[name]
    if devices is not None:
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] if visible else str(i) for i in devices)
    return environment


def kill(process: Process) -> None:
    """Kill a server and its workers, which are one process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def log_tail(log: Path) -> str:
    """The end of a server's log; "" if there is none."""
    with contextlib.suppress(OSError):
        return log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
    return ""
