"""Regression gate: head and update against a peer in the same rounds, compared with committed ratios.

python -m benchmarks.gate                     all cases, about two minutes of one core
python -m benchmarks.gate --short             those that CI runs, under twenty seconds
python -m benchmarks.gate --record            measure, and make the ratios those to compare with

Times are CPU times of all threads: a busy machine delays a call, but the call does not compute more. They still depend
on the machine; the ratio to code of plain torch, in the same process and the same rounds, depends on it far less. A case is
worse if its ratio, less two standard errors of its median, is above the recorded one by more than --tolerance. Ratios are
recorded for each combination of CPU features, backend and number of threads; where none is recorded, nothing is compared, and
the command says so.

head      loss and gradients of the language-model head, against plain torch with all logits
update    one optimizer update of a prompt with trace and rollouts, against one row per sequence, logits of supervised tokens

Exit status 1: a case is worse than recorded.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import exit_status, log, make_parser, markdown, new_report, write_report
from benchmarks.head_methods import METHODS as HEADS
from benchmarks.head_problem import make_problem
from benchmarks.stamp import stamp
from benchmarks.update_methods import METHODS as UPDATES
from benchmarks.update_problem import Shape
from benchmarks.update_run import Bench, UpdateCase
from pact_fast.files import write_text
from pact_fast.kernels import backends

RECORDED = Path(__file__).parent / "results" / "gate.json"
CPU = torch.device("cpu")
Calls = dict[str, Callable[[], object]]  # "ours" and "peer"


@dataclass(frozen=True)
class Gate:
    """One comparison.

    calls   makes what is timed: "ours" and "peer"
    rounds  paired rounds
    short   whether CI runs it
    """

    calls: Callable[[], Calls]
    rounds: int
    short: bool = False


def head(shape: tuple[int, int, int], dtype: torch.dtype) -> Callable[[], Calls]:
    """Half of the tokens have a loss, as in an update where observations have none."""

    def calls() -> Calls:
        problem = make_problem(shape, dtype, CPU, 0.5)
        names = {"ours": f"pact {backend()}", "peer": "eager"}

        def step(name: str) -> Callable[[], object]:
            def run() -> None:
                problem.clear()
                HEADS[name].step(problem)

            return run

        return {key: step(name) for key, name in names.items()}

    return calls


def update(model: str, shape: Shape, dtype: str) -> Callable[[], Calls]:
    """Calls of one update of a model, 2 layers of it: ours as a token tree, the peer's by selected logits."""

    def calls() -> Calls:
        layers = 2
        bench = Bench(UpdateCase(model, layers, shape, dtype, 1, False), CPU)
        peer = UPDATES["selected-logits"]
        return {
            "ours": lambda: bench.step(UPDATES["tree"], {}),
            "peer": lambda: bench.step(peer, peer.settings(shape)[0]),
        }

    return calls


def backend() -> str:
    """Backend of the head on this CPU."""
    return "cpp" if backends().get("cpp") == "ready" else "torch"


GATES = {
    "head fp32": Gate(head((512, 256, 8192), torch.float32), 9, short=True),
    "head bf16": Gate(head((512, 256, 8192), torch.bfloat16), 9, short=True),
    "update fp32": Gate(update("30m", Shape(128, 128, 48, 4), "float32"), 5, short=True),
    "head fp32, large": Gate(head((1024, 1024, 16384), torch.float32), 9),
    "head bf16, large": Gate(head((1024, 1024, 16384), torch.bfloat16), 9),
    "update bf16": Gate(update("30m", Shape(512, 512, 128, 8), "bfloat16"), 7),
}


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of ours / peer, and the standard error of that median, from the median absolute deviation."""

    median: float
    error: float

    @classmethod
    def of(cls, ours: list[float], peer: list[float]) -> Ratio:
        """From paired times in seconds: the median of ours/peer, and its standard error, robust against outliers."""
        ratios = [a / b for a, b in zip(ours, peer, strict=True)]
        median = statistics.median(ratios)
        deviation = 1.4826 * statistics.median(abs(ratio - median) for ratio in ratios)
        return cls(median, math.sqrt(math.pi / 2) * deviation / math.sqrt(len(ratios)))

    def worse(self, recorded: float, tolerance: float) -> bool:
        """Whether the ratio is above the recorded one by more than `tolerance` (a fraction), two standard errors aside."""
        return self.median - 2 * self.error > recorded * (1 + tolerance)


def measure(gate: Gate) -> tuple[Ratio, dict[str, float]]:
    """The ratio, and the median milliseconds of both, after one call of each that is not timed."""
    calls = gate.calls()
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(gate.rounds):
        for name in ("ours", "peer") if index % 2 else ("peer", "ours"):
            begin = time.process_time()
            calls[name]()
            times[name].append(1e3 * (time.process_time() - begin))
    return Ratio.of(times["ours"], times["peer"]), {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    """Describe the machine as far as a ratio depends on it: CPU features, backend, threads."""
    flags = stamp(commit="-")["machine"]["cpu"]["flags"]
    return ", ".join([*flags, backend(), f"threads {torch.get_num_threads()}"])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "gate")
    parser.add_argument("--short", action="store_true", help="only the cases that CI runs")
    parser.add_argument("--tolerance", type=float, default=0.25, help="(default: %(default)s)")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name}")
    parser.add_argument("--recorded", type=Path, default=RECORDED, metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    recorded: dict[str, Any] = json.loads(args.recorded.read_text()) if args.recorded.exists() else {}
    here = machine()
    before = recorded.get(here, {}).get("ratios", {})
    report = new_report("gate", args, compared_with=here if before else None, cases={})
    rows, failures = [], []
    for name, gate in GATES.items():
        if args.short and not gate.short:
            continue
        log(f"  {name}")
        ratio, times = measure(gate)
        report["cases"][name] = {"ratio": ratio.median, "error": ratio.error, "ms": times}
        old = before.get(name)
        shown = [f"{ratio.median:.3f} ± {2 * ratio.error:.3f}", f"{old:.3f}" if old else ""]
        rows.append([name, f"{times['ours']:.1f}", f"{times['peer']:.1f}", *shown])
        if old and ratio.worse(old, args.tolerance):
            failures.append(f"{name}: {ratio.median:.3f} times its peer, recorded were {old:.3f}")
    print(markdown(["case", "ours, ms", "peer, ms", "ours / peer", "recorded"], rows))
    write_report(report, args.out)
    if args.record:
        ratios = before | {name: round(case["ratio"], 4) for name, case in report["cases"].items()}
        recorded[here] = {**stamp(args.date, args.commit), "ratios": ratios}
        write_text(args.recorded, json.dumps(recorded, indent=1) + "\n")
        return 0
    if not before:
        print(f"nothing to compare with: no ratios are recorded for {here}; --record writes them")
    return exit_status(failures)


if __name__ == "__main__":
    sys.exit(main())
