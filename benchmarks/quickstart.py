"""Quickstart: success before and after training, for several seeds, against the promised ranges.

python -m benchmarks.quickstart                             seeds 0, 1, 2; under half an hour on two cores
python -m benchmarks.quickstart --seeds 3 --out results.json
python -m benchmarks.quickstart rollout.engine=vllm         the same with other settings
python -m benchmarks.quickstart --processes 2 threads=1     under torchrun

Each seed is a run of its own, `pact-fast train quickstart`, one after the other.

Exit status 1: a seed is outside the promised ranges.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import make_parser, new_report, write_report

PROMISE = {
    "base_success": "at most 0.35",
    "success": "at least 0.85",
    "greedy": "not below the base",
    "minutes": "at most 10",
}


def train(seed: int, settings: list[str], folder: Path, processes: int) -> dict:
    """Train the quickstart as a user does, in `processes` processes; returns the summary."""
    out = folder / f"seed_{seed}"
    own = [f"seed={seed}", f"output_dir={out}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(launcher if processes > 1 else []), "-m", "pact_fast"]
    subprocess.run([*start, "train", "quickstart", *own, *settings], check=True)
    return json.loads((out / "summary.json").read_text())


def within_promise(summary: dict) -> bool:
    base, trained = summary["base_success"]["mean"], summary["success"]["mean"]
    greedy = summary["greedy"]["mean"] >= summary["base_greedy"]["mean"]
    return base <= 0.35 and trained >= 0.85 and greedy and summary["wall_seconds"] <= 600


def row(summary: dict) -> str:
    def rate(key: str) -> str:
        value = summary[key]
        return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"

    cells = [str(summary["seed"]), *map(rate, ("base_success", "success", "base_greedy", "greedy"))]
    return (
        "| "
        + " | ".join([*cells, f"{summary['wall_seconds'] / 60:.1f}", "yes" if within_promise(summary) else "NO"])
        + " |"
    )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "quickstart")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that override the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="(default: 0 1 2)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="training processes (default: 1)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report = new_report("quickstart", args, settings=args.settings, processes=args.processes, runs=[])
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            report["runs"].append(train(seed, args.settings, Path(folder), args.processes))
            write_report(report, args.out)
    print("promised: " + "; ".join(f"{key} {value}" for key, value in PROMISE.items()))
    print("| seed | base, sampled | trained, sampled | base, greedy | trained, greedy | minutes | as promised |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(map(row, report["runs"])))
    return 0 if all(map(within_promise, report["runs"])) else 1


if __name__ == "__main__":
    sys.exit(main())
