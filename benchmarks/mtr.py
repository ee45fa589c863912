"""MTR on a CPU: gain of GRPO on the trace reward over SFT on complete traces, on held-out questions.

python -m benchmarks.mtr                             the recipe, seeds 0, 1, 2
python -m benchmarks.mtr --seeds 0 --folder runs/mtr
python -m benchmarks.mtr trainer.max_steps=20        the same with other settings

Each seed is a run of `pact-fast train mtr-quickstart` on one thread: its base model is the result of stage 1. "gain" is the
difference of exact match between the two, sampled at temperature 1, one sample per question, with its 95 % interval
(Newcombe 1998, method 10); the last line is over the questions of all seeds. A and C are means of the reward's parts over
the first and the last tenth of stage 2's steps: C must not rise while A falls.

Exit status 1: the interval over all seeds does not exclude zero, or C rises while A falls.
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
from pathlib import Path
from typing import Any

from benchmarks.harness import exit_status, make_parser, markdown, new_report, write_report
from pact_fast.report.before_after import Comparison, Rate
from pact_fast.train.evaluate import Rate as WilsonRate

RECIPE = "mtr-quickstart"
PARTS = {"A": "reward/trace_answer", "C": "reward/trace_consistency"}


def train(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train the recipe, unless its run is there: success before and after stage 2, reward parts, and CPU seconds."""
    out = args.folder / f"seed_{seed}"
    own = [f"seed={seed}", f"output_dir={out}", "resume=auto", f"threads={args.threads}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not (out / "summary.json").exists():
        subprocess.run([sys.executable, "-m", "pact_fast", "train", RECIPE, *own, *args.settings], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = json.loads((out / "summary.json").read_text())
    names = ("base_success", "success", "base_greedy", "greedy", "wall_seconds")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seed": seed, "cpu_seconds": round(cpu, 1), **{name: summary[name] for name in names}, **reward_parts(out)}


def reward_parts(run: Path) -> dict[str, list[float]]:
    """{part: [mean of the first tenth of the steps, mean of the last tenth]}."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if PARTS["A"] in record]
    tenth = max(len(steps) // 10, 1)
    ends = (steps[:tenth], steps[-tenth:])
    return {part: [sum(record[key] for record in end) / tenth for end in ends] for part, key in PARTS.items()}


def gain(run: dict[str, Any]) -> Rate:
    """Return the gain in success rate by stage 2, with its interval."""
    change = Comparison("", Rate.read(run["base_success"]), Rate.read(run["success"])).change
    assert change and change.ends
    return change


def over_all(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs as one, for the last line."""
    pooled: dict[str, Any] = {"seed": "all", "cpu_seconds": sum(run["cpu_seconds"] for run in runs)}
    for name in ("base_success", "success", "base_greedy", "greedy"):
        successes = sum(round(run[name]["mean"] * run[name]["n"]) for run in runs)
        failures = sum(run[name]["n"] for run in runs) - successes
        pooled[name] = WilsonRate.of([1.0] * successes + [0.0] * failures).to_json()
    return pooled | {part: [sum(run[part][i] for run in runs) / len(runs) for i in (0, 1)] for part in PARTS}


def row(run: dict[str, Any]) -> list[str]:
    change = gain(run)
    rates = [f"{run[name]['mean']:.2f}" for name in ("base_success", "success", "base_greedy", "greedy")]
    parts = [f"{run[part][0]:.2f}, {run[part][1]:.2f}" for part in PARTS]
    return [
        str(run["seed"]),
        *rates,
        f"{change.mean:+.2f} [{', '.join(f'{end:+.2f}' for end in change.ends or ())}]",
        *parts,
        f"{run['cpu_seconds'] / 60:.1f}",
    ]


HEADINGS = ["seed", "SFT", "SFT + GRPO", "SFT, greedy", "GRPO, greedy", "gain", "A", "C", "CPU minutes"]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "mtr")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that override the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="(default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/mtr"), help="of the runs; finished ones are not repeated"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report = new_report("mtr", args, settings=args.settings, runs=[])
    for seed in args.seeds:
        report["runs"].append(train(seed, args))
        write_report(report, args.out)
    pooled = over_all(report["runs"])
    print(markdown(HEADINGS, [row(run) for run in [*report["runs"], pooled]]))
    low, _ = gain(pooled).ends or (0.0, 0.0)
    failures = [] if low > 0 else ["the interval of the gain does not exclude zero"]
    failures += ["C rises while A falls"] if pooled["C"][1] > pooled["C"][0] and pooled["A"][1] < pooled["A"][0] else []
    return exit_status(failures)


if __name__ == "__main__":
    sys.exit(main())
