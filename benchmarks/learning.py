"""Learning study: PACT and other methods on equal budgets, in several regimes, over several seeds.

python -m benchmarks.learning WORK --out results.json                   all regimes and methods, seeds 0 to 4
python -m benchmarks.learning WORK --regimes long-outcome --methods grpo pact --seeds 0
python -m benchmarks.learning WORK --methods pact pact-no-anchor pact-no-sft --regimes dense
python -m benchmarks.learning WORK --list                               regimes and methods, and how many runs are missing
python -m benchmarks.learning_report results.json                       tables and plots

Every method starts from the same base model, has the same training tasks in the same order, the same number of rollouts
and of optimizer steps; `sft` samples none. The learning rate of a method is the one of --tries that does best, sampled,
on validation tasks with a seed of its own (--tuning-seed); test tasks are other ones. With --jobs, runs are processes of
one thread each. WORK keeps base models, task files and one line for each finished run in runs.jsonl: started again, the
command goes on where it was stopped; a run under way is lost.

Exit status 1: a run failed; the others are done.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.harness import exit_status, failure, log, make_parser, markdown, new_report, write_report
from benchmarks.learning_methods import ALL, METHODS
from benchmarks.learning_regimes import REGIMES
from benchmarks.learning_run import Budget, Job, evaluate_base, run_job
from benchmarks.learning_tuning import best_rate
from pact_fast.errors import PactError
from pact_fast.files import write_text

Record = dict[str, Any]
BASE = "base"  # the method of the records of untrained base models
LOCAL = [name for name, regime in REGIMES.items() if regime.base]  # those that need no model from elsewhere


def read_records(path: Path) -> list[Record]:
    """Records of finished runs. A last line that a killed process left unfinished is dropped."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    return [json.loads(line) for line in lines[:-1]]


def append_record(path: Path, record: Record) -> None:
    """Add a line, on disk before this returns."""
    with path.open("ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def check_budget(work: Path, budget: Budget) -> None:
    """Results of one folder share a budget, or they could not be compared. PactError if it was begun with another one."""
    path, text = work / "budget.json", json.dumps(asdict(budget))
    if not path.exists():
        write_text(path, text)
    elif path.read_text() != text:
        raise PactError(f"{work} holds runs of the budget {path.read_text()}; name another folder, or the same budget")


def job_of(record: Record) -> Job:
    """The job of a record."""
    return Job(**{field.name: record[field.name] for field in fields(Job)})


def missing_jobs(regime: str, args: argparse.Namespace, records: list[Record]) -> list[Job]:
    """Jobs of a regime that can be run now: tuning runs; once those of all methods are done, test runs, seed by seed."""
    done = {job_of(record).name for record in records}
    methods = [name for name in args.methods if REGIMES[regime].reward in ALL[name].rewards]
    tuning, rates = [], {}
    for name in methods:
        tried = ALL[name].rates[: args.tries]
        if len(tried) == 1:
            rates[name] = tried[0]
            continue
        tuning += [Job(regime, name, args.tuning_seed, rate, "validation") for rate in tried]
        rates[name] = best_rate(records, regime, name, tried)
    missing = [job for job in tuning if job.name not in done]
    if missing:
        return missing
    base = [Job(regime, BASE, seed, 0.0, "test") for seed in args.seeds]
    test = [Job(regime, name, seed, rates[name], "test") for seed in args.seeds for name in methods if rates[name]]
    return [job for job in [*base, *test] if job.name not in done]


def perform(job: Job, budget: Budget, work: Path) -> Record:
    """A job in a process of its own."""
    if job.method == BASE:
        return evaluate_base(job.regime, job.seed, budget, work)
    return run_job(job, budget, work)


def run_all(
    pool: ProcessPoolExecutor,
    jobs: list[Job],
    args: argparse.Namespace,
    on_record: Callable[[Record], None],
    failures: list[str],
) -> None:
    """Run jobs in the processes of the pool."""
    futures = {pool.submit(perform, job, args.budget, args.work): job for job in jobs}
    for future in as_completed(futures):
        try:
            on_record(future.result())
        except Exception as error:
            failures.append(f"{futures[future].name}: {failure(error)}")
            log(failures[-1])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "learning")
    parser.add_argument("work", type=Path, metavar="WORK", help="folder of the study, made if need be")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=LOCAL, metavar="NAME", help="in this order")
    parser.add_argument("--methods", nargs="+", choices=ALL, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument("--tries", type=int, default=3, help="learning rates of each method (default: %(default)s)")
    parser.add_argument("--tuning-seed", type=int, default=100, metavar="SEED", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print regimes and methods with the runs that are missing")
    for field in fields(Budget):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    args.budget = Budget(**{field.name: getattr(args, field.name) for field in fields(Budget)})
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that run the jobs
    args.work.mkdir(parents=True, exist_ok=True)
    check_budget(args.work, args.budget)
    lines = args.work / "runs.jsonl"
    records = read_records(lines)
    report = new_report("learning", args, budget=asdict(args.budget), tries=args.tries, runs=records, failures=[])
    if args.list:
        print(overview(args, records))
        return 0

    def keep(record: Record) -> None:
        append_record(lines, record)
        records.append(record)
        end = record["curve"][-1]
        log(f"{job_of(record).name}: sampled {end['sampled']:.2f}, greedy {end['greedy']:.2f}, {end['cpu_seconds']} s")
        write_report(report, args.out)

    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for regime in args.regimes:
            for _ in ("tuning", "test"):
                if jobs := missing_jobs(regime, args, records):
                    run_all(pool, jobs, args, keep, report["failures"])
    write_report(report, args.out)
    return exit_status(report["failures"])


def overview(args: argparse.Namespace, records: list[Record]) -> str:
    """Regimes with the number of runs that can be started now, and methods with their settings."""
    regimes = [[name, REGIMES[name].about, str(len(missing_jobs(name, args, records)))] for name in args.regimes]
    methods = [[name, " ".join(ALL[name].settings)] for name in ALL]
    return markdown(["regime", "", "runs to do"], regimes) + "\n\n" + markdown(["method", "settings"], methods)


if __name__ == "__main__":
    sys.exit(main())
