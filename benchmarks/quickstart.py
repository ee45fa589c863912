"""Does the quickstart keep its promise? Runs it for several seeds, one after the other, and checks the success band.

python benchmarks/quickstart.py                    seeds 0, 1, 2; under half an hour on two cores
python benchmarks/quickstart.py --seeds 3 --out results.json
python benchmarks/quickstart.py rollout.engine=vllm       the same promise with other settings
python benchmarks/quickstart.py --processes 2 threads=1   under torchrun
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

PROMISE = {
    "base_success": "at most 0.35",
    "success": "at least 0.85",
    "greedy": "not below the base",
    "minutes": "at most 10",
}


def run(seed: int, settings: list[str], folder: Path, processes: int) -> dict:
    """One whole run as a user starts it, in a process or several of its own; its summary."""
    out = folder / f"seed_{seed}"
    own = [f"seed={seed}", f"output_dir={out}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable, *(launcher if processes > 1 else []), "-m", "pact_fast"]
    subprocess.run([*start, "train", "quickstart", *own, *settings], check=True)
    return json.loads((out / "summary.json").read_text())


def kept(summary: dict) -> bool:
    base, trained = summary["base_success"]["mean"], summary["success"]["mean"]
    greedy = summary["greedy"]["mean"] >= summary["base_greedy"]["mean"]
    return base <= 0.35 and trained >= 0.85 and greedy and summary["wall_seconds"] <= 600


def row(summary: dict) -> str:
    def rate(key: str) -> str:
        value = summary[key]
        return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"

    cells = [str(summary["seed"]), *map(rate, ("base_success", "success", "base_greedy", "greedy"))]
    return "| " + " | ".join([*cells, f"{summary['wall_seconds'] / 60:.1f}", "yes" if kept(summary) else "NO"]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that override the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="training processes (default: 1)")
    parser.add_argument("--out", type=Path, help="write the summaries as JSON here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summaries = [run(seed, arguments.settings, Path(folder), arguments.processes) for seed in arguments.seeds]
    print("promised: " + "; ".join(f"{key} {value}" for key, value in PROMISE.items()))
    print("| seed | base, sampled | trained, sampled | base, greedy | trained, greedy | minutes | kept |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(map(row, summaries)))
    if arguments.out:
        machine = {"cores": os.cpu_count(), "machine": platform.machine()}
        asked = {"settings": arguments.settings, "processes": arguments.processes}
        arguments.out.write_text(json.dumps({"machine": machine, **asked, "runs": summaries}, indent=2) + "\n")
    return 0 if all(map(kept, summaries)) else 1


if __name__ == "__main__":
    sys.exit(main())
