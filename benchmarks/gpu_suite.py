"""Everything that needs a GPU, in one command and under nine minutes, so that any GPU at hand can be used at once.

python benchmarks/gpu_suite.py --out gpu.json            all sections
python benchmarks/gpu_suite.py --list                    what they are
python benchmarks/gpu_suite.py --only head rows          some of them
python benchmarks/gpu_suite.py --device cpu              a dry run of the same code at small sizes, without a GPU

Each section is a command of its own in a process of its own, with a time budget; a section that fails or runs out of
time keeps what it has written and costs the others nothing. Status: 0 all passed, 1 something failed, 2 no CUDA.
"""

from __future__ import annotations

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

sys.path.insert(0, str(Path(__file__).parent))  # a script among its siblings, from wherever it is imported

from measure import stamp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TESTS = tuple(f"tests/test_{name}.py" for name in ("rows", "head_precision", "merge", "tree"))
TAIL = 6000  # characters of a section's output that go into the JSON


@dataclass(frozen=True)
class Section:
    """command(device, results file) is run; `missing` says why it cannot be, else None."""

    what: str
    seconds: float  # the budget; all of them together stay under nine minutes
    command: Callable[[str, Path], list[str]]
    missing: Callable[[], str | None] = lambda: None


def script(name: str, *options: str, cpu: tuple[str, ...] = ()) -> Callable[[str, Path], list[str]]:
    """A script of this folder; `cpu`: its options in a dry run."""

    def command(device: str, out: Path) -> list[str]:
        chosen = cpu if device == "cpu" else options
        return [sys.executable, str(HERE / name), "--device", device, "--out", str(out), *chosen]

    return command


def tests(device: str, out: Path) -> list[str]:
    present = [test for test in TESTS if (ROOT / test).exists()]
    chosen = present[-1:] if device == "cpu" else present
    return [sys.executable, "-m", "pytest", "-q", "-x" if device == "cpu" else "--maxfail=20", *chosen]


def no_pytest() -> str | None:
    if importlib.util.find_spec("pytest"):
        return None
    return "pytest is not installed here; section 'correctness' needs none and has the cases that break on a GPU"


SECTIONS = {
    "tests": Section(f"pytest {' '.join(TESTS)}", 100, tests, no_pytest),
    "correctness": Section("both kernels against fp64 at the sizes that break others", 110, script("correctness.py")),
    "head": Section(
        "the head beside its peers: N=16384 D=4096 V=151936, then Qwen3-0.6B's; fractions 1, 0.5, 0.25",
        170,
        script(
            "head.py", *("--shapes", "16384x4096x151936", "qwen3-0.6b", "--rounds", "5", "--time-limit", "110"),
            cpu=("--shapes", "64x32x515", "--dtypes", "float32", "--fractions", "0.5", "--rounds", "2", "--no-memory",
                 "--methods", "gemms", "eager", "pact torch", "pact cpp"),
        ),
    ),
    "update": Section(
        "a whole update of Qwen3-0.6B: every sequence alone, flat sharing, the tree",
        80,
        script(
            "update_step.py",
            *("--model", "qwen3-0.6b", "--shape", "4096,4096,1024,8", "--rounds", "3", "--time-limit", "50", "--only",
              "alone-1", "kept", "flat-pact", "tree"),
            cpu=("--model", "tiny", "--shape", "16,16,8,2", "--rounds", "1", "--no-memory", "--only", "kept", "tree"),
        ),
    ),
    "rows": Section("bandwidth of the row kernels, registers and spills", 60, script("rows.py")),
}  # fmt: skip


def run(section: Section, device: str) -> dict[str, Any]:
    """What became of a section: passed, failed, out of time or not possible, with its results and the end of its output."""
    reason = section.missing()
    if reason:
        return {"status": "not possible", "reason": reason}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "results.json", Path(folder) / "log"
        command = section.command(device, out)
        # the package of this checkout, installed or not
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path}
        begin = time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = "passed" if process.wait(section.seconds) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "out of time"
            with contextlib.suppress(ProcessLookupError):  # the section and whatever it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result: dict[str, Any] = {"status": status, "exit_code": process.returncode, "command": " ".join(command[1:])}
        result["seconds"] = round(time.monotonic() - begin, 1)
        with contextlib.suppress(OSError, json.JSONDecodeError):
            result["results"] = json.loads(out.read_text())
        result["output"] = log.read_text(errors="replace")[-TAIL:]
        return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--list", action="store_true", help="name the sections and stop")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite.json"))
    parser.add_argument("--date", help="of the stamp; default today")
    parser.add_argument("--commit", help="of the stamp; default what git says")
    args = parser.parse_args(argv)
    plan = {name: SECTIONS[name] for name in args.only}
    no_cuda = args.device == "cuda" and not torch.cuda.is_available()
    if args.list or no_cuda:
        for name, section in plan.items():
            print(f"{name:12} {section.seconds:4.0f} s  {section.what}")
        if no_cuda and not args.list:
            print("no CUDA device here: nothing was run (--device cpu makes a dry run)", file=sys.stderr)
            return 2
        return 0
    report: dict[str, Any] = {"suite": "gpu", "device": args.device, **stamp(args.date, args.commit), "sections": {}}
    if not report["commit"]:
        print("no git here: the results do not name their commit (--commit)", flush=True)
    for name, section in plan.items():
        print(f"{name}: {section.what}", flush=True)
        report["sections"][name] = result = run(section, args.device)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(result.get("output", ""), f"{name}: {result['status']} {result.get('reason', '')}", sep="\n", flush=True)
    states = {name: result["status"] for name, result in report["sections"].items()}
    print("; ".join(f"{name}: {state}" for name, state in states.items()) + f"; results in {args.out}")
    return 0 if all(state in ("passed", "not possible") for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
