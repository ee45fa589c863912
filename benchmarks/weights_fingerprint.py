"""Fingerprints of weights: seconds per GB of every backend, against the blockwise formula that they replaced.

python -m benchmarks.weights_fingerprint                       256 MB of fp32 and of bf16, [R, 4096]
python -m benchmarks.weights_fingerprint --megabytes 8         a smoke test

Before anything is timed, all backends must agree, on the whole and on the sum of its parts, and one flipped bit, two rows
in each other's place and another dtype must show.

blockwise   the formula of version 0.1: int64 copies of 2²² elements at a time, and their coefficients recomputed
s/GB        median over rounds; "CPU s/GB": of CPU time, which on a busy machine says more (CPU only)
x faster    blockwise over this method: median over rounds of the ratio within a round; of CPU time on the CPU

Exit status 1: a result is wrong, or the backend that is chosen by default is less than 10 times as fast as blockwise.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import (
    Case,
    add_device_option,
    exit_status,
    make_parser,
    markdown,
    new_report,
    write_report,
)
from benchmarks.measure import median_ratio, paired_rounds
from pact_fast.kernels import backends
from pact_fast.kernels.fingerprint import MASK, fingerprint
from pact_fast.kernels.runtime.backends import resolve

COLUMNS = 4096
AT_LEAST = 10.0
BLOCK = 1 << 22  # of the peer
BLOCKWISE = "blockwise"


@dataclass(frozen=True)
class FingerprintCase(Case):
    """A matrix of `rows` by 4096."""

    rows: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} [{self.rows}, {COLUMNS}]"


def blockwise(tensor: torch.Tensor) -> int:
    """The fingerprint of version 0.1: the same sum, with other coefficients."""
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    b = _coefficients(0, tensor.shape[1], tensor.device, 2)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    step = max(1, BLOCK // tensor.shape[1])
    for start in range(0, len(tensor), step):
        bits = tensor[start : start + step].contiguous().view(integers).to(torch.int64)
        total += ((bits * b).sum(1) * _coefficients(start, len(bits), tensor.device, 1)).sum()
    return int(total) & MASK


def _coefficients(start: int, count: int, device: torch.device, salt: int) -> torch.Tensor:
    def signed(value: int) -> int:
        value &= MASK
        return value - (1 << 64) if value >> 63 else value

    x = torch.arange(start + 1, start + count + 1, device=device).mul_(signed(0x9E3779B97F4A7C15 * salt))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * signed(factor)
    return x | 1


def methods(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor], int]]:
    """The peer, and every backend of ours for this device."""
    own = [resolve("auto", device, dtype), "torch"]
    return {BLOCKWISE: blockwise} | {n: functools.partial(fingerprint, backend=n) for n in dict.fromkeys(own)}


def check(tensor: torch.Tensor, calls: dict[str, Callable[[torch.Tensor], int]]) -> list[str]:
    """List the errors of our backends; empty if there are none."""
    found = {name: call(tensor) for name, call in calls.items() if name != BLOCKWISE}
    wrong = [] if len(set(found.values())) == 1 else [f"the backends differ: {found}"]
    value, half = next(iter(found.values())), len(tensor) // 2
    parts = [fingerprint(tensor[:half, 7:], 0, 7), fingerprint(tensor[:half, :7]), fingerprint(tensor[half:], half)]
    if sum(parts) & MASK != value:
        wrong.append("the parts do not add up")
    for fault, changed in _faults(tensor).items():
        wrong += [
            f"{fault} does not show in {name}" for name, call in calls.items() if call(changed) == found.get(name)
        ]
    return wrong


def _faults(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    flipped, swapped = tensor.clone(), tensor.clone()
    flipped.view(torch.uint8)[len(tensor) // 3, 1001] ^= 16
    swapped[[1, 2]] = tensor[[2, 1]]
    other = {torch.float32: torch.int32, torch.bfloat16: torch.float16}[tensor.dtype]
    return {"a flipped bit": flipped, "a swap of two rows": swapped, "another dtype": tensor.view(other)}


def measure_case(case: FingerprintCase, device: torch.device, rounds: int) -> dict[str, Any]:
    """Paired rounds of all methods on a tensor."""
    torch.manual_seed(0)
    tensor = torch.randn(case.rows, COLUMNS, device=device).to(getattr(torch, case.dtype))
    calls = methods(device, tensor.dtype)
    wrong = check(tensor, calls)
    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> None:
        begin = time.process_time()
        calls[name](tensor)
        cpu[name].append(time.process_time() - begin)

    wall = paired_rounds({n: functools.partial(timed, n) for n in calls}, dict.fromkeys(calls, rounds), device)
    used, gigabytes = wall if device.type == "cuda" else cpu, tensor.nbytes / 1e9
    rows = [
        {
            "method": name,
            "s_per_gb": statistics.median(wall[name]) / 1e3 / gigabytes,
            "cpu_s_per_gb": statistics.median(cpu[name]) / gigabytes,
            "times_faster": median_ratio(used[BLOCKWISE], used[name]),
            "round_ms": wall[name],
        }
        for name in calls
    ]
    chosen = rows[1]
    if not wrong and chosen["times_faster"] < AT_LEAST:
        wrong.append(f"{chosen['method']} is {chosen['times_faster']:.1f} times as fast, not {AT_LEAST:g}")
    return {"case": str(case), **case.request(), "rows": rows, "failures": wrong}


def table(result: dict[str, Any]) -> str:
    lines = [
        [r["method"], f"{r['s_per_gb']:.4f}", f"{r['cpu_s_per_gb']:.4f}", f"{r['times_faster']:.1f}"]
        for r in result["rows"]
    ]
    return f"\n{result['case']}\n\n" + markdown(["method", "s/GB", "CPU s/GB", "x faster"], lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "weights_fingerprint")
    add_device_option(parser)
    parser.add_argument("--megabytes", type=int, default=256, metavar="N", help="of a matrix (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    device = torch.device(args.device)
    report = new_report("weights_fingerprint", args, device=args.device, backends=backends(), cases=[])
    for dtype in ("float32", "bfloat16"):
        rows = max(4, args.megabytes * 10**6 // (COLUMNS * getattr(torch, dtype).itemsize))
        report["cases"].append(measure_case(FingerprintCase(rows, dtype), device, args.rounds))
        print(table(report["cases"][-1]), flush=True)
    write_report(report, args.out)
    return exit_status(f"{case['case']}: {line}" for case in report["cases"] for line in case["failures"])


if __name__ == "__main__":
    sys.exit(main())
