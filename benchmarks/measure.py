"""Time in paired rounds, and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

MIB = 1 << 20
# glibc keeps freed blocks below a threshold that grows with use; a fixed one makes resident memory equal live memory
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def milliseconds(
    call: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Duration of one call by `clock`. On CUDA: between two events, with the device synchronised before and after."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = clock()
    call()
    return 1e3 * (clock() - begin)


def paired_rounds(
    calls: Mapping[str, Callable[[], object]],
    rounds: Mapping[str, int],
    device: torch.device,
    between: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every call, once per round, in an order that rotates by one from round to round.

    Clock rate, temperature and other load drift, so ratios are taken within a round; see `median_ratio`.

    Args:
        calls: The calls by name.
        rounds: Number of rounds by name; a call takes part in the first of them.
        device: Where the calls run.
        between: Called before every call, not timed.
        clock: In seconds; `time.process_time` leaves out the time that other processes take. CUDA has its own.
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
                    times[name].append(milliseconds(calls[name], device, clock))
    finally:
        gc.enable()
    return times


def median_ratio(times: list[float], baseline: list[float]) -> float:
    """Median of times[i] / baseline[i] over the rounds that both have."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=False))


class PeakMemory:
    """Peak memory of a `with` block, in bytes beyond the memory held when it began.

    CUDA: peak of the caching allocator. CPU: high-water mark of resident memory (VmHWM, Linux); meaningful only in a
    process started under the MALLOC settings. `before` and `bytes` are None where they cannot be read.
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
            self.before = resident_bytes("VmRSS") if _reset_high_water() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if self._cuda else resident_bytes("VmHWM")
        self.bytes = None if peak is None or self.before is None else peak - self.before


def resident_bytes(field: str) -> int | None:
    """VmRSS (current) or VmHWM (peak) of this process in bytes; None without /proc."""
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
