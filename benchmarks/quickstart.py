"""Recipes for a CPU: success before and after training, time and memory, against the promised ranges.

python -m benchmarks.quickstart                             seeds 0, 1, 2; under half an hour on two cores
python -m benchmarks.quickstart --seeds 3 --out results.json
python -m benchmarks.quickstart rollout.engine=vllm         the same with other settings
python -m benchmarks.quickstart --processes 2 threads=1     under torchrun
python -m benchmarks.quickstart model.path=models/smollm2 --recipe smollm2-cpu --seeds 0

Each seed is a run of its own, `pact-fast train quickstart`, one after the other. Where the recipe starts from a model
with weights, that model is evaluated first, before its warm-up: column "untrained". CPU time is that of all threads, and
says how long a run takes where nothing else does.

Exit status 1: a seed is outside the promised ranges.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness import make_parser, new_report, write_report
from pact_fast.config import load_config


@dataclass(frozen=True)
class Promise:
    """Documented results of a recipe: bounds of sampled success rates, minutes and memory.

    The greedy success rate must not fall, either.
    """

    base_at_most: float
    success_at_least: float
    minutes_at_most: float
    gigabytes_at_most: float


PROMISES = {"quickstart": Promise(0.35, 0.85, 10, 8), "smollm2-cpu": Promise(0.25, 0.3, 45, 8)}


def train(seed: int, args: argparse.Namespace, folder: Path) -> dict:
    """Train the recipe as a user does; returns the summary with CPU seconds, peak memory and the untrained success."""
    out = folder / f"seed_{seed}"
    own = [f"seed={seed}", f"output_dir={out}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    start = [sys.executable, *(launcher if args.processes > 1 else []), "-m", "pact_fast"]
    untrained = (
        _untrained(args, folder / "untrained.json") if load_config(args.recipe, args.settings).model.path else None
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*start, "train", args.recipe, *own, *args.settings], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = json.loads((out / "summary.json").read_text())
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return summary | {"cpu_seconds": round(cpu, 1), "peak_kib": after.ru_maxrss, "untrained": untrained}


def _untrained(args: argparse.Namespace, out: Path) -> dict:
    """Success of the model that the recipe starts from."""
    command = [sys.executable, "-m", "pact_fast", "eval", args.recipe, *args.settings, "--out", str(out)]
    subprocess.run(command, check=True)
    return json.loads(out.read_text())


def within_promise(summary: dict, promise: Promise) -> bool:
    """Whether success, time and memory of a run keep what the documentation promises."""
    base, trained = summary["base_success"]["mean"], summary["success"]["mean"]
    greedy = summary["greedy"]["mean"] >= summary["base_greedy"]["mean"]
    time = summary["wall_seconds"] <= 60 * promise.minutes_at_most
    memory = summary["peak_kib"] * 1024 <= promise.gigabytes_at_most * 1e9
    return base <= promise.base_at_most and trained >= promise.success_at_least and greedy and time and memory


def row(summary: dict, promise: Promise) -> str:
    """A line of the table: a run, and whether it keeps the promise."""

    def rate(key: str) -> str:
        value = summary[key]
        return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"

    untrained = summary["untrained"]
    cells = [
        str(summary["seed"]),
        f"{untrained['sampled']['success']:.2f}" if untrained else "",
        *map(rate, ("base_success", "success", "base_greedy", "greedy")),
        f"{summary['wall_seconds'] / 60:.1f}",
        f"{summary['cpu_seconds'] / 60:.1f}",
        f"{summary['peak_kib'] * 1024 / 1e9:.1f}",
        "yes" if within_promise(summary, promise) else "NO",
    ]
    return "| " + " | ".join(cells) + " |"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "quickstart")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that override the recipe's")
    parser.add_argument("--recipe", choices=PROMISES, default="quickstart", help="(default: quickstart)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="(default: 0 1 2)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="training processes (default: 1)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    promise = PROMISES[args.recipe]
    fields = {"recipe": args.recipe, "promise": asdict(promise), "settings": args.settings, "processes": args.processes}
    report = new_report("quickstart", args, **fields, runs=[])
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            report["runs"].append(train(seed, args, Path(folder)))
            write_report(report, args.out)
    print("promised: " + ", ".join(f"{key} {value}" for key, value in asdict(promise).items()))
    print(
        "| seed | untrained | base, sampled | trained, sampled | base, greedy | trained, greedy | minutes | CPU minutes "
        "| peak GB | as promised |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(row(run, promise) for run in report["runs"]))
    return 0 if all(within_promise(run, promise) for run in report["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
