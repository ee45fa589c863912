"""A busy machine: how much longer rollouts, head and update take while other processes keep every core busy.

python -m benchmarks.contention                          about a minute and a half on two cores
python -m benchmarks.contention --waiting package libgomp passive      other ways for OpenMP's threads to wait
python -m benchmarks.contention --quick                  tiny sizes, one round: a smoke test without a verdict

In every round, each piece of work runs alone and beside one single-thread process per core (`while True`), which this
command starts, stops and continues. All torch threads are in use. A scheduler that is fair to threads gives each of them
half a core then: 2.0 is what work costs that keeps all cores busy and loses nothing by waiting.

rollouts    the embedded engine on the quickstart's model of 1 M parameters: 32 sessions of 128 + 48 tokens
head        policy loss and its gradients, fp32: N=1024 D=512 V=32768
update      loss, gradients and AdamW of the quickstart's model by token trees: many small parallel regions

quiet s, busy s   medians over rounds
factor            median over rounds of busy/quiet within a round; must be at most 2
others            cores that processes other than these took in quiet rounds (/proc/stat): median, largest. A round counts
                  only if they took at most 0.1 cores in both of its halves; without three such rounds there is no verdict

--waiting         package: what `import pact_fast` sets; libgomp: its own default, spinning; passive: sleeping at once;
                  a number: GOMP_SPINCOUNT. Only `package` has to pass

Exit status 1: a factor is above 2, or the machine was not quiet enough to say.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import ROOT, exit_status, log, make_parser, markdown, new_report, write_report
from benchmarks.head_methods import METHODS as HEADS
from benchmarks.head_problem import make_problem
from benchmarks.update_methods import METHODS as UPDATES
from benchmarks.update_problem import Shape
from benchmarks.update_run import Bench, UpdateCase, build
from pact_fast.kernels import backends
from pact_fast.openmp import USERS_CHOICE
from pact_fast.rollout.embedded.engine import TransformersEngine
from pact_fast.rollout.engine import Request

LIMIT = 2.0
QUIET = 0.1  # cores that other processes may take
ENOUGH = 3  # rounds
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"
CPU = torch.device("cpu")


class BusyProcesses:
    """Single-thread processes that compute while `running`, and are stopped otherwise; they end with this process."""

    def __init__(self, count: int):
        self._all = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        self._signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, all processes run; outside they are stopped."""
        self._signal(signal.SIGCONT)
        try:
            time.sleep(0.05)
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def seconds(self) -> float:
        """CPU time that they have taken."""
        return sum(_process_seconds(process.pid) for process in self._all)

    def close(self) -> None:
        """End the processes."""
        for process in self._all:
            process.kill()
            process.wait()

    def _signal(self, number: int) -> None:
        for process in self._all:
            process.send_signal(number)


def _process_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """CPU time that all processes of the machine have taken, and the time that its host gave to other machines."""
    user, nice, system, _, _, interrupt, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def observed(call: Callable[[], object], busy: BusyProcesses) -> dict[str, float]:
    """Seconds of a call, and the cores that other processes took meanwhile."""
    known = time.process_time() + busy.seconds()
    begin, total = time.perf_counter(), machine_seconds()
    call()
    seconds = time.perf_counter() - begin
    others = machine_seconds() - total - (time.process_time() + busy.seconds() - known)
    return {"seconds": seconds, "others": max(0.0, others / seconds)}


def works(quick: bool) -> dict[str, Callable[[], object]]:
    """The pieces of work, each to be called again and again."""
    model = "tiny" if quick else "quickstart"
    update = Bench(
        UpdateCase(model, 2 if quick else 4, Shape(160, 120, 96, 8), "float32", 1 if quick else 6, False), CPU
    )
    head_shape = (64, 64, 515) if quick else (1024, 512, 32_768)
    problem = make_problem(head_shape, torch.float32, CPU, 1.0)
    head = HEADS["pact cpp" if backends()["cpp"] == "ready" else "pact torch"]
    sampler = build(UpdateCase(model, update.case.layers, update.case.shape, "float32", 1, False), CPU).eval()
    return {
        "rollouts": functools.partial(sample, sampler, *((4, 16, 4) if quick else (32, 128, 48))),
        "head": functools.partial(head_step, head, problem),
        "update": lambda: update.step(UPDATES["tree"], {}),
    }


def sample(model: Any, sessions: int, prompt: int, tokens: int) -> None:
    """One turn of every session with the embedded engine."""
    engine = TransformersEngine(model, (), slots=sessions)
    engine.update_weights(model, 0)
    rng = np.random.default_rng(0)
    for session in range(sessions):
        engine.submit(Request(session, rng.integers(0, model.config.vocab_size, prompt), tokens, (0, session)))
    left = sessions
    while left:
        left -= len(engine.step())


def head_step(head: Any, problem: Any) -> None:
    """Loss and gradients of a head, from no gradients on."""
    problem.clear()
    head.step(problem)


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """{work: rounds of quiet and busy observations}, in this process, whose OpenMP waits as its environment says."""
    busy = BusyProcesses(len(os.sched_getaffinity(0)))
    try:
        rounds: dict[str, list[dict[str, Any]]] = {}
        for name, call in works(request["quick"]).items():
            call()  # warm
            for index in range(request["rounds"]):
                halves: dict[str, Any] = {}
                for half in ("quiet", "busy") if index % 2 == 0 else ("busy", "quiet"):
                    with busy.running() if half == "busy" else contextlib.nullcontext():
                        halves[half] = observed(call, busy)
                rounds.setdefault(name, []).append(halves)
        return {"threads": torch.get_num_threads(), "spin_count": os.environ.get("GOMP_SPINCOUNT"), "rounds": rounds}
    finally:
        busy.close()


def measure(waiting: str, args: argparse.Namespace) -> dict[str, Any]:
    """The rows of one way to wait, measured in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.contention", "--probe"]
    request = json.dumps({"quick": args.quick, "rounds": args.rounds})
    environment = waiting_environment(waiting, dict(os.environ))
    done = subprocess.run([*command, request], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "waiting": waiting, "threads": found["threads"], "spin_count": found["spin_count"],
        "rows": {name: summary(rounds) for name, rounds in found["rounds"].items()},
    }  # fmt: skip


def waiting_environment(waiting: str, environment: dict[str, str]) -> dict[str, str]:
    """The environment of a process whose threads wait in this way."""
    chosen = {"package": {}, "libgomp": {"GOMP_SPINCOUNT": "300000"}, "passive": {"OMP_WAIT_POLICY": "passive"}}
    kept = {key: value for key, value in environment.items() if key not in USERS_CHOICE}
    return kept | chosen.get(waiting, {"GOMP_SPINCOUNT": waiting})


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over undisturbed rounds; "factor" is None if there are too few."""
    calm = [r for r in rounds if max(r["quiet"]["others"], r["busy"]["others"]) <= QUIET]
    others = [r["quiet"]["others"] for r in rounds]
    return {
        "quiet_s": statistics.median(r["quiet"]["seconds"] for r in rounds),
        "busy_s": statistics.median(r["busy"]["seconds"] for r in rounds),
        "factor": statistics.median(_factors(calm)) if len(calm) >= ENOUGH else None,
        "factor_of_all_rounds": statistics.median(_factors(rounds)),
        "calm_rounds": len(calm),
        "others": {"median": statistics.median(others), "largest": max(others)},
        "rounds": rounds,
    }


def _factors(rounds: list[dict[str, Any]]) -> list[float]:
    return [r["busy"]["seconds"] / r["quiet"]["seconds"] for r in rounds]


def failures(results: list[dict[str, Any]]) -> list[str]:
    """List the reasons why the package's own way to wait does not pass; empty if it passes."""
    found = []
    for result in results:
        for name, row in result["rows"].items() if result["waiting"] == "package" else ():
            if row["factor"] is None:
                found.append(
                    f"{name}: no verdict, other processes took {row['others']['median']:.1f} cores (at most {QUIET:g}); "
                    "run it again on a quiet machine"
                )
            elif row["factor"] > LIMIT:
                found.append(f"{name}: {row['factor']:.2f} times its quiet time, at most {LIMIT:g}")
    return found


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        [
            name, result["waiting"], f"{row['quiet_s']:.3f}", f"{row['busy_s']:.3f}",
            f"{row['factor']:.2f}" if row["factor"] else f"({row['factor_of_all_rounds']:.2f}, disturbed)",
            f"{row['others']['median']:.2f}, {row['others']['largest']:.2f}",
        ]
        for result in results
        for name, row in result["rows"].items()
    ]  # fmt: skip
    return markdown(["work", "waiting", "quiet s", "busy s", "factor", "others"], sorted(lines, key=lambda row: row[0]))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "contention")
    parser.add_argument("--rounds", type=int, help="(default: 9; with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as a smoke test without a verdict")
    parser.add_argument("--waiting", nargs="+", default=["package"], metavar="WAY", help="(default: package)")
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # one way to wait, in a process of its own
    args = parser.parse_args(argv)
    for way in args.waiting:
        if way not in ("package", "libgomp", "passive") and not way.isdigit():
            parser.error(f"--waiting {way}: expected package, libgomp, passive or a number")
    args.rounds = args.rounds or (1 if args.quick else 9)
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.probe:
        print(json.dumps(probe(json.loads(args.probe))))
        return 0
    report = new_report("contention", args, rounds=args.rounds, quick=args.quick, results=[])
    for waiting in args.waiting:
        log(f"  {waiting}")
        report["results"].append(measure(waiting, args))
    report["failures"] = [] if args.quick else failures(report["results"])
    print(table(report["results"]))
    write_report(report, args.out)
    return exit_status(report["failures"])


if __name__ == "__main__":
    sys.exit(main())
