"""How near the memory's speed are the row kernels of the head? Bytes they must move over time, beside a plain copy.

python benchmarks/rows.py                       CUDA: rows_triton on 1024 rows of 151,936 and 128,256 logits
python benchmarks/rows.py --device cpu          rows_torch on a small table, which shows only that this runs

Bytes counted: what the pass cannot avoid. forward at temperature 1: z read once; with temperatures: z read and written;
backward: z read, dz written. Also the kernels that torch.profiler saw, and registers, spills and shared memory of every
compiled Triton kernel of the module.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # a script among its siblings, from wherever it is imported

from measure import markdown, paired_rounds, stamp

SHAPES = {"cuda": [(1024, 151_936), (1024, 128_256)], "cpu": [(64, 4099)]}
MODULES = {"cuda": "pact_fast.kernels.head.softmax_triton", "cpu": "pact_fast.kernels.head.softmax_torch"}


class RowPass:
    """The row kernels on n rows of V fp32 logits; `restore` undoes what a call has done to them."""

    def __init__(self, rows: ModuleType, n: int, vocab: int, device: torch.device):
        self.rows = rows
        rng = torch.Generator(device).manual_seed(0)
        self.original = 3.0 * torch.randn(n, vocab, generator=rng, device=device)
        self.z = self.original.clone()
        self.narrow = torch.empty(n, vocab, dtype=torch.bfloat16, device=device)
        self.target = torch.randint(vocab, (n,), generator=rng, device=device)
        self.ones = torch.ones(n, device=device)
        self.warm = 0.5 + torch.rand(n, generator=rng, device=device)
        self.source = torch.arange(n, device=device)
        self.g, self.h = (torch.randn(n, generator=rng, device=device) for _ in range(2))
        self.stats = rows.forward(self.original.clone(), self.target, None, self.ones, None)

    def restore(self) -> None:
        self.z.copy_(self.original)

    def backward(self, out: torch.Tensor, h: torch.Tensor | None = None) -> None:
        self.rows.backward(self.z, out, self.source, self.target, self.ones, None, self.stats, self.g, h)

    def calls(self) -> dict[str, tuple[Callable[[], object], int]]:
        """{name: (call, bytes it must move)}."""
        wide, narrow = self.z.nbytes, self.narrow.nbytes
        return {
            "copy": (lambda: self.z.copy_(self.original), 2 * wide),
            "forward": (lambda: self.rows.forward(self.z, self.target, None, self.ones, None), wide),
            "forward, temperatures": (lambda: self.rows.forward(self.z, self.target, None, self.warm, None), 2 * wide),
            "backward, in place": (lambda: self.backward(self.z), 2 * wide),
            "backward, entropy too": (lambda: self.backward(self.z, self.h), 2 * wide),
            "backward, bf16 out": (lambda: self.backward(self.narrow), wide + narrow),
        }


def bandwidth(table: RowPass, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Median GB/s of every call, and its share of the copy's."""
    results: list[dict[str, Any]] = []
    live: dict[str, tuple[Callable[[], object], int]] = {}
    for name, (call, moved) in table.calls().items():
        try:
            for _ in range(3):
                table.restore()
                call()
            live[name] = (call, moved)
        except Exception as error:  # a variant this module does not offer
            results.append({"call": name, "status": f"{type(error).__name__}: {str(error)[:160]}"})
    times = paired_rounds(
        {name: call for name, (call, _) in live.items()}, dict.fromkeys(live, rounds), device, between=table.restore
    )
    speed = {name: moved / statistics.median(times[name]) / 1e6 for name, (_, moved) in live.items()}
    for name, (_, moved) in live.items():
        numbers = {"bytes": moved, "ms": statistics.median(times[name]), "gb_per_s": speed[name]}
        share = speed[name] / speed["copy"]
        results.append({"call": name, "status": "ok", **numbers, "share_of_copy": share, "rounds_ms": times[name]})
    return results


def profile(table: RowPass, device: torch.device) -> list[dict[str, Any]]:
    """The kernels (on the CPU: ops) that one forward and one backward launch, by time."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    table.restore()
    with profile(activities=[activity]) as profiler:
        table.calls()["forward"][0]()
        table.calls()["backward, in place"][0]()
        if device.type == "cuda":
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, time_of))
    return [{"kernel": e.key[:120], "calls": e.count, "us": getattr(e, time_of)} for e in events[:8]]


def compiled_kernels(module: ModuleType) -> list[dict[str, Any]]:
    """Registers, spills and shared memory of every Triton kernel of the module that has run in this process."""
    kernels = []
    for name, function in vars(module).items():
        while hasattr(function, "fn") and not hasattr(function, "device_caches"):
            function = function.fn  # under an autotuner or heuristics
        for caches in getattr(function, "device_caches", {}).values():
            for kernel in caches[0].values():
                facts = {key: getattr(kernel, key, None) for key in ("n_regs", "n_spills")}
                facts |= {key: getattr(kernel.metadata, key, None) for key in ("shared", "num_warps", "num_stages")}
                kernels.append({"kernel": name, **facts})
    return kernels


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    report: dict[str, Any] = {"benchmark": "rows", "module": MODULES[args.device], **stamp(), "shapes": []}
    try:
        rows = importlib.import_module(MODULES[args.device])
    except ImportError as error:
        print(f"FAIL {error}")
        report["failures"] = [str(error)]
    else:
        for n, vocab in SHAPES[args.device]:
            table = RowPass(rows, n, vocab, device)
            results = bandwidth(table, device, args.rounds)
            report["shapes"].append({"n": n, "V": vocab, "calls": results, "profiler": profile(table, device)})
            print(f"\n{n} rows of {vocab} fp32 logits\n\n{render(results)}", flush=True)
        report["compiled"] = compiled_kernels(rows)
        for kernel in report["compiled"]:
            print(kernel)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1, default=str) + "\n")
    return 1 if report.get("failures") else 0


def render(results: list[dict[str, Any]]) -> str:
    lines = [
        [r["call"], f"{r['ms']:.3f}", f"{r['gb_per_s']:.0f}", f"{r['share_of_copy']:.0%}"]
        if r["status"] == "ok"
        else [r["call"], "", "", r["status"]]
        for r in results
    ]
    return markdown(["call", "ms", "GB/s", "of a copy"], lines)


if __name__ == "__main__":
    sys.exit(main())
