"""Memory bandwidth of the head's softmax kernels, compared with a plain copy; registers and spills of the Triton kernels.

python -m benchmarks.softmax_bandwidth                  CUDA: softmax_triton on 1024 rows of 151,936 and 128,256 logits
python -m benchmarks.softmax_bandwidth --device cpu     softmax_torch on a small table; a smoke test

Bytes counted are those that a pass cannot avoid. Forward at temperature 1: z read once; with temperatures: z read and
written; backward: z read, dz written. Results also hold the kernels seen by torch.profiler, and registers, spills and
shared memory of every compiled Triton kernel of the module.

Exit status 1: the module cannot be imported.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from benchmarks.harness import add_device_option, exit_status, failure, make_parser, markdown, new_report, write_report
from benchmarks.measure import paired_rounds

SHAPES = {"cuda": [(1024, 151_936), (1024, 128_256)], "cpu": [(64, 4099)]}
MODULES = {"cuda": "pact_fast.kernels.head.softmax_triton", "cpu": "pact_fast.kernels.head.softmax_torch"}


class SoftmaxPasses:
    """The softmax kernels on n rows of V fp32 logits, which they overwrite; `restore` resets them."""

    def __init__(self, module: ModuleType, n: int, vocab: int, device: torch.device):
        self.module = module
        rng = torch.Generator(device).manual_seed(0)
        self.original = 3.0 * torch.randn(n, vocab, generator=rng, device=device)
        self.z = self.original.clone()
        self.narrow = torch.empty(n, vocab, dtype=torch.bfloat16, device=device)
        self.target = torch.randint(vocab, (n,), generator=rng, device=device)
        self.ones = torch.ones(n, device=device)
        self.warm = 0.5 + torch.rand(n, generator=rng, device=device)
        self.source = torch.arange(n, device=device)
        self.g, self.h = (torch.randn(n, generator=rng, device=device) for _ in range(2))
        self.stats = module.forward(self.original.clone(), self.target, None, self.ones, None)

    def restore(self) -> None:
        self.z.copy_(self.original)

    def backward(self, out: torch.Tensor, h: torch.Tensor | None = None) -> None:
        self.module.backward(self.z, out, self.source, self.target, self.ones, None, self.stats, self.g, h)

    def calls(self) -> dict[str, tuple[Callable[[], object], int]]:
        """{name: (call, bytes that it must move)}."""
        wide, narrow = self.z.nbytes, self.narrow.nbytes
        return {
            "copy": (lambda: self.z.copy_(self.original), 2 * wide),
            "forward": (lambda: self.module.forward(self.z, self.target, None, self.ones, None), wide),
            "forward, temperatures": (
                lambda: self.module.forward(self.z, self.target, None, self.warm, None),
                2 * wide,
            ),
            "backward, in place": (lambda: self.backward(self.z), 2 * wide),
            "backward, entropy too": (lambda: self.backward(self.z, self.h), 2 * wide),
            "backward, bf16 out": (lambda: self.backward(self.narrow), wide + narrow),
        }


def bandwidth(table: SoftmaxPasses, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Median GB/s of every call, and the fraction of the copy's."""
    results: list[dict[str, Any]] = []
    live: dict[str, tuple[Callable[[], object], int]] = {}
    for name, (call, moved) in table.calls().items():
        try:
            for _ in range(3):
                table.restore()
                call()
            live[name] = (call, moved)
        except Exception as error:  # a call that this module does not have
            results.append({"call": name, "status": failure(error)})
    times = paired_rounds(
        {name: call for name, (call, _) in live.items()}, dict.fromkeys(live, rounds), device, between=table.restore
    )
    speed = {name: moved / statistics.median(times[name]) / 1e6 for name, (_, moved) in live.items()}
    for name, (_, moved) in live.items():
        numbers = {"bytes": moved, "ms": statistics.median(times[name]), "gb_per_s": speed[name]}
        fraction = speed[name] / speed["copy"]
        results.append(
            {"call": name, "status": "ok", **numbers, "fraction_of_copy": fraction, "rounds_ms": times[name]}
        )
    return results


def profile(table: SoftmaxPasses, device: torch.device) -> list[dict[str, Any]]:
    """Kernels (CPU: ops) of one forward and one backward pass, the slowest first."""
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


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "softmax_bandwidth")
    add_device_option(parser)
    parser.add_argument("--rounds", type=int, default=20, help="paired rounds (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    device = torch.device(args.device)
    report = new_report("softmax_bandwidth", args, module=MODULES[args.device], shapes=[], failures=[])
    try:
        module = importlib.import_module(MODULES[args.device])
    except ImportError as error:
        report["failures"].append(failure(error))
    else:
        for n, vocab in SHAPES[args.device]:
            passes = SoftmaxPasses(module, n, vocab, device)
            results = bandwidth(passes, device, args.rounds)
            report["shapes"].append({"n": n, "V": vocab, "calls": results, "profiler": profile(passes, device)})
            print(f"\n{n} rows of {vocab} fp32 logits\n\n{render(results)}", flush=True)
            write_report(report, args.out)
        report["compiled"] = compiled_kernels(module)
        for kernel in report["compiled"]:
            print(kernel)
    write_report(report, args.out)
    return exit_status(report["failures"])


def render(results: list[dict[str, Any]]) -> str:
    lines = [
        [r["call"], f"{r['ms']:.3f}", f"{r['gb_per_s']:.0f}", f"{r['fraction_of_copy']:.0%}"]
        if r["status"] == "ok"
        else [r["call"], "", "", r["status"]]
        for r in results
    ]
    return markdown(["call", "ms", "GB/s", "of a copy"], lines)


if __name__ == "__main__":
    sys.exit(main())
