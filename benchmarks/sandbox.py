"""Tool calls: the time of a warm call in the sandbox, beside that of another commit, in paired rounds.

python -m benchmarks.sandbox --baseline COMMIT             this checkout against COMMIT, with pauses between calls and without
python -m benchmarks.sandbox --rounds 400 --out results.json

Each version serves one worker in a process of its own. In a round each makes one call, in rotating order. Generated text lies
between two calls of a trajectory, in which the worker prepares the next call; with a pause of 0 it has no time for that.

ratio   median over rounds of the ratio within a round; at most 1.2

Exit status 1: the ratio is above 1.2 for any pause, or a call gave a wrong answer.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, exit_status, make_parser, markdown, new_report, write_report
from benchmarks.measure import median_ratio

LIMIT = 1.2
PAUSES = (0.0, 0.03)  # seconds between two calls
# prints the milliseconds of one call for every line that it reads
CALLER = """
import sys, time
from pact_fast.envs.python_tools.pool import SandboxPool
source = "import json, re, datetime\\ndef f(a, b): return {'sum': a + b}"
with SandboxPool(workers=1) as pool:
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        answer = pool.call(source, "f", {"a": 1, "b": int(line)})
        print(1e3 * (time.perf_counter() - started), answer == '{"sum": %d}' % (1 + int(line)), flush=True)
"""


class Caller:
    """A process that makes calls with one version of the package. `folder`: holds `pact_fast`."""

    def __init__(self, folder: Path):
        environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CALLER], env=environment, cwd=folder, text=True, stdin=-1, stdout=-1
        )
        if self._read() != ["ready"]:
            raise RuntimeError(f"the workers of {folder} do not start")

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def call(self, number: int) -> float:
        """Milliseconds."""
        assert self.process.stdin
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        milliseconds, right = self._read()
        if right != "True":
            raise RuntimeError("a call gave a wrong answer")
        return float(milliseconds)

    def _read(self) -> list[str]:
        assert self.process.stdout
        return self.process.stdout.readline().split()


def extract(commit: str, folder: Path) -> None:
    """The package at a commit."""
    archive = subprocess.run(["git", "archive", commit, "pact_fast"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def measure(callers: dict[str, Caller], pause: float, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call by version."""
    times: dict[str, list[float]] = {name: [] for name in callers}
    names = list(callers)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            for number in range(1 if pause else 2):  # the second call follows at once
                time.sleep(pause)
                milliseconds = callers[name].call(index + number)
            times[name].append(milliseconds)
    return times


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "sandbox")
    parser.add_argument("--baseline", metavar="COMMIT", help="commit to compare with (default: none)")
    parser.add_argument("--rounds", type=int, default=200, help="calls per version and pause (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report: dict[str, Any] = new_report("sandbox", args, baseline=args.baseline, rounds=args.rounds, pauses={})
    failures = []
    with ExitStack() as stack:
        folders = {"this checkout": ROOT}
        if args.baseline:
            folders["baseline"] = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            extract(args.baseline, folders["baseline"])
        callers = {name: stack.enter_context(Caller(folder)) for name, folder in folders.items()}
        rows = []
        for pause in PAUSES:
            times = measure(callers, pause, args.rounds)
            ratio = median_ratio(times["this checkout"], times["baseline"]) if args.baseline else None
            report["pauses"][str(pause)] = {"ms": times, "ratio": ratio}
            if ratio is not None and ratio > LIMIT:
                failures.append(f"pause {pause} s: a call takes {ratio:.2f} times that of the baseline, limit {LIMIT}")
            for name, values in times.items():
                shown = f"{ratio:.3f}" if ratio is not None and name == "this checkout" else ""
                rows.append([f"{1e3 * pause:.0f}", name, f"{statistics.median(values):.2f}", shown])
    print(markdown(["pause ms", "version", "median ms", "ratio"], rows))
    write_report(report, args.out)
    return exit_status(failures)


if __name__ == "__main__":
    sys.exit(main())
