"""All GPU checks and benchmarks in one command of under eight minutes, the most valuable first.

python -m benchmarks.gpu_suite --out gpu.json            all sections
python -m benchmarks.gpu_suite --list                    sections and their time budgets
python -m benchmarks.gpu_suite --only head update        some of them
python -m benchmarks.gpu_suite --device cpu              smoke test at small sizes, without a GPU

Each section is a command in a process of its own, with a time budget; one that fails or runs out of time keeps the results
that it has written, and the others run. A section writes its results as it goes to a file next to --out (gpu.head.json);
gpu.json, written after every section, holds all of them, exit codes and the end of the output.

Exit status: 0 all passed, 1 a section failed, 2 no CUDA device.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, make_parser, new_report, write_report

LIMIT = 470.0  # seconds; of all sections, also if budgets should add up to more
TESTS = tuple(f"tests/test_{name}.py" for name in ("tree", "attention_merge", "softmax", "head_precision"))
RECURRENCES = ("tests/test_recurrence_kernels.py", "tests/test_tree_decoders.py")
TAIL = 6000  # characters of a section's output that go into the JSON


@dataclass(frozen=True)
class Section:
    """A section of the suite: one command in a process of its own.

    title      its line in --list
    seconds    time budget
    command    (device, result file) → command line
    needs      modules that it imports besides torch and triton
    """

    title: str
    seconds: float
    command: Callable[[str, Path], list[str]]
    needs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Which modules of `needs` are not installed, as a sentence; None: all are."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def benchmark(name: str, *options: str, cpu: tuple[str, ...] = ()) -> Callable[[str, Path], list[str]]:
    """A section's command: a benchmark with these options, or in a smoke test with the options `cpu`."""

    def command(device: str, out: Path) -> list[str]:
        chosen = cpu if device == "cpu" else options
        return [sys.executable, "-m", f"benchmarks.{name}", "--device", device, "--out", str(out), *chosen]

    return command


def tests(device: str, out: Path) -> list[str]:
    """The command of pytest on TESTS; in a smoke test, on the first of them."""
    chosen = TESTS[:1] if device == "cpu" else TESTS
    return [sys.executable, "-m", "pytest", "-q", "-x" if device == "cpu" else "--maxfail=20", *chosen]


def recurrences(device: str, out: Path) -> list[str]:
    """The command of pytest on RECURRENCES, for the tests whose names hold the device: "cuda" or "gpu", or "cpu"."""
    chosen = RECURRENCES[:1] if device == "cpu" else RECURRENCES
    return [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "cpu" if device == "cpu" else "cuda or gpu", *chosen]


SECTIONS = {
    "correctness": Section("both kernels against fp64 at sizes where kernels tend to fail", 90, benchmark("correctness")),
    "head": Section(
        "head and other projects: N=16384 D=4096 V=151936, then Qwen3-0.6B's; fractions 1, 0.5, 0.25",
        115,
        benchmark(
            "head", *("--shapes", "16384x4096x151936", "qwen3-0.6b", "--rounds", "5", "--time-limit", "90"),
            cpu=("--shapes", "64x32x515", "--dtypes", "float32", "--fractions", "0.5", "--rounds", "2", "--no-memory",
                 "--methods", "gemms", "eager", "pact torch", "pact cpp"),
        ),
    ),
    "update": Section(
        "one update of Qwen3-0.6B: per sequence, shared prefix per context, token tree",
        75,
        benchmark(
            "update_step",
            *("--model", "qwen3-0.6b", "--shape", "4096,4096,1024,8", "--rounds", "3", "--time-limit", "50", "--only",
              "tree", "prefix-pact", "selected-logits-b1", "full-logits-b1"),
            cpu=("--model", "tiny", "--shape", "16,16,8,2", "--rounds", "1", "--no-memory", "--only", "tree",
                 "selected-logits"),
        ),
        needs=("transformers", "pydantic", "yaml"),
    ),
    "tests": Section(f"pytest {' '.join(TESTS)}", 80, tests, needs=("pytest", "transformers")),
    "recurrences": Section(
        "delta rules, Mamba-2 and convolutions on trees, with the kernels of fla, mamba_ssm and causal_conv1d if installed",
        60,
        recurrences,
        needs=("pytest", "transformers"),
    ),
    "softmax": Section("bandwidth of the softmax kernels, registers and spills", 30, benchmark("softmax_bandwidth")),
    "fingerprint": Section(
        "fingerprints of weights", 20, benchmark("weights_fingerprint", cpu=("--megabytes", "1", "--rounds", "1"))
    ),
}  # fmt: skip


def run(section: Section, device: str, out: Path, seconds: float) -> dict[str, Any]:
    """Run a section for at most `seconds`.

    Returns:
        "status" (passed, failed, out of time, or not possible with a "reason"), command, exit code, duration, "results"
        from its result file `out`, and the end of its output.
    """
    if reason := section.missing():
        return {"status": "not possible", "reason": reason}
    if seconds < 1:
        return {"status": "out of time", "reason": "the time of the whole suite was over"}
    with tempfile.TemporaryFile("w+b") as stream:
        out.unlink(missing_ok=True)
        command = section.command(device, out)
        begin = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=_environment()
        )
        try:
            status = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):  # the section and all processes that it started
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        result: dict[str, Any] = {"status": status, "exit_code": process.returncode, "command": " ".join(command[1:])}
        result["seconds"] = round(time.monotonic() - begin, 1)
        with contextlib.suppress(OSError, json.JSONDecodeError):
            result["results"] = json.loads(out.read_text())
        stream.seek(0)
        result["output"] = stream.read().decode(errors="replace")[-TAIL:]
        return result


def _environment() -> dict[str, str]:
    """This checkout's package comes first, whether or not one is installed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "gpu_suite")
    parser.set_defaults(out=Path("gpu_suite.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: smoke test (default: cuda)")
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
        help=f"default: all of {', '.join(SECTIONS)}",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the sections and exit")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    sections = {name: SECTIONS[name] for name in args.only}
    no_cuda = args.device == "cuda" and not torch.cuda.is_available()
    if args.list or no_cuda:
        for name, section in sections.items():
            print(f"{name:12} {section.seconds:4.0f} s  {section.title}")
        if no_cuda and not args.list:
            print("no CUDA device: nothing was run; --device cpu is a smoke test", file=sys.stderr)
            return 2
        return 0
    report = new_report("gpu_suite", args, device=args.device, sections={})
    if not report["commit"]:
        print("no git repository: the results name no commit; pass --commit", flush=True)
    out = args.out.resolve()
    begin = time.monotonic()
    for name, section in sections.items():
        print(f"{name}: {section.title}", flush=True)
        left = LIMIT - (time.monotonic() - begin)
        result = run(section, args.device, out.with_suffix(f".{name}.json"), min(section.seconds, left))
        report["sections"][name] = result
        write_report(report, out)
        print(result.get("output", ""), f"{name}: {result['status']} {result.get('reason', '')}", sep="\n", flush=True)
    states = {name: result["status"] for name, result in report["sections"].items()}
    print("; ".join(f"{name}: {state}" for name, state in states.items()) + f"; results in {args.out}")
    return 0 if all(state in ("passed", "not possible") for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
