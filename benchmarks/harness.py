"""The frame of the benchmarks: command line, cases and methods, the process that measures memory, result files, tables.

A benchmark measures `Case`s; in each, `Method`s compete: ours and those of other projects, in one process and in the
same rounds. A method that does not run is a row of the table with the reason; one of ours that fails, or gives a wrong
result, fails the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import MALLOC
from benchmarks.stamp import stamp

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"cut-cross-entropy": "cut_cross_entropy", "liger-kernel": "liger_kernel", "prefix-grouper": "prefix_grouper"}
SLOW_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of inputs that all methods are measured on. `str(case)` is its heading."""

    def request(self) -> dict[str, Any]:
        """The fields, for JSON; `type(case)(**request)` is the case again."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One implementation in a comparison; subclasses add the calls.

    package    distribution that it needs; None: nothing beyond this project's dependencies
    ours       a failure of it, or a wrong result, fails the benchmark
    """

    package: str | None = None
    ours: bool = False

    def not_installed(self) -> str | None:
        """How to install the method's package; None: it is installed, or needs none."""
        if self.package and importlib.util.find_spec(MODULES.get(self.package, self.package)) is None:
            return f"not installed: pip install {self.package}"
        return None


def make_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser whose --help is the benchmark's docstring, with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write all results as JSON to FILE (default: print only)"
    )
    parser.add_argument("--date", help="ISO date for the result file (default: today)")
    parser.add_argument("--commit", help="commit for the result file (default: git rev-parse HEAD)")
    return parser


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """args.device, `cpu` or `cuda`."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=default, help="where to measure (default: cuda if there is one)"
    )


def add_case_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Options of benchmarks that run `run_cases`."""
    parser.add_argument("--rounds", type=int, default=rounds, help="paired rounds per method (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no further case after S seconds")
    parser.add_argument("--probe", help=argparse.SUPPRESS)  # memory of one method on the CPU, in a process of its own


def add_clock_option(parser: argparse.ArgumentParser) -> None:
    """args.clock, a function that returns seconds."""
    parser.add_argument(
        "--cpu-time", dest="clock", action="store_const", const=time.process_time, default=time.perf_counter,
        help="times on the CPU are CPU time of this process, which other programs disturb less",
    )  # fmt: skip


def new_report(name: str, args: argparse.Namespace, **fields: Any) -> dict[str, Any]:
    """A result file's head: the benchmark's name, stamp and `fields`."""
    return {"benchmark": name, **stamp(args.date, args.commit), **fields}


def write_report(report: Mapping[str, Any], out: Path | None) -> None:
    """Write the report as JSON to `out`, if there is one."""
    if out:
        out.write_text(json.dumps(report, indent=1, default=str) + "\n")


def run_cases(
    args: argparse.Namespace,
    report: dict[str, Any],
    cases: Iterable[Case],
    measure: Callable[[Any], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measure all cases; print a table and write the result file after each.

    A case that raises counts as a failure, and the next one is measured.

    Args:
        args: With `time_limit` and `out`.
        report: The result file; gets "cases", "not_run" and "failures".
        cases: In the order of measurement.
        measure: Case → its results, with a list "failures".
        table: Results of a case → text.

    Returns:
        The exit status: 1 if there is a failure.
    """
    begin = time.monotonic()
    report |= {"cases": [], "not_run": [], "failures": []}
    for case in cases:
        if args.time_limit and time.monotonic() - begin > args.time_limit:
            report["not_run"].append(str(case))
        else:
            _run_case(report, case, measure, table)
        write_report(report, args.out)
    for line in report["not_run"]:
        print(f"not run, --time-limit was over: {line}")
    return exit_status(report["failures"])


def _run_case(
    report: dict[str, Any],
    case: Case,
    measure: Callable[[Any], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    log(f"\n{case}")
    try:
        result = measure(case)
    except Exception as error:
        report["failures"].append(f"{case}: {failure(error)}")
        return
    print(table(result), flush=True)
    report["cases"].append(result)
    report["failures"] += [f"{case}: {line}" for line in result["failures"]]


def exit_status(failures: Iterable[str]) -> int:
    """Print the failures; 1 if there are any."""
    lines = [f"FAIL {line}" for line in failures]
    for line in lines:
        print(line)
    return 1 if lines else 0


def rounds_per_method(trials: Mapping[str, float], base: str | None, slow: float, rounds: int) -> dict[str, int]:
    """Number of rounds by method: methods more than `slow` times slower than `base` take part in the first few only.

    Args:
        trials: Time of one call by method.
        base: The method that is compared with; None: all take part in all rounds.
        slow: Factor.
        rounds: Of all other methods.
    """
    limit = float("inf") if base is None else slow * trials[base]
    return {name: min(rounds, SLOW_ROUNDS) if trial > limit else rounds for name, trial in trials.items()}


def probe_in_process(benchmark: str, request: dict[str, Any], note: str) -> dict[str, Any]:
    """Resident memory on the CPU, measured by `benchmark --probe request` in a fresh process under the MALLOC settings.

    Returns:
        The probe's JSON, or {note: last line of its error}.
    """
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--probe", json.dumps(request)]
    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        return {note: (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def failure(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:160]}"


def log(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def number(value: float | None, form: str) -> str:
    """A table's cell; empty for None."""
    return "" if value is None else format(value, form)


def settings_text(setting: Mapping[str, Any]) -> str:
    """`key=value, key=value`."""
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal, too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
