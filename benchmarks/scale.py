"""Growth of costs: each part at several sizes, with its exponent, with instant engines and simulated ranks.

python -m benchmarks.scale                      all parts, about six minutes of one core and 5 GB of temporary files
python -m benchmarks.scale --parts step read    some of them
python -m benchmarks.scale --largest 1024       up to this size only: a smoke test

Seconds are of CPU time, so that other processes disturb them little. A part's exponent is the slope of log seconds
over log size between its two largest sizes: 1 grows in proportion, 0 not at all, 2 with the square.

step       one rank of a training step without the model: rollouts of 4,096 tokens in groups of 16 are exchanged, batched,
           packed, laid out and recorded; size: prompts of the step. The other ranks are imagined: they hold what this rank
           holds, and whatever they would send is decoded here. MB: peak memory beyond what the imports take
assign     packs are assigned to 64 ranks; size: parts
rollouts   rollouts of one step are looked up in rollouts/, with 32 rollouts of 4,096 tokens a step; size: steps
save       a checkpoint of fp32 weights with AdamW's states; size: MB of weights. Training waits for "blocked", and for
           what is left of "copies" when it comes to the next optimizer step
zero       the same under DeepSpeed ZeRO in two processes (gloo), stages 2 and 3: what training waits for; size: MB of weights.
           Seconds per GB of weights: of the training thread, of the process (gathering has threads of its own), of wall time
turns      turns of a vLLM server, contexts of 512 tokens and 32 sampled, all open at once, in the client; size: turns. The
           median, the least and the most of three clients
tools      calls of a Python tool that waits for a second, all at once; size: calls. The trainer's CPU time, and seconds
           of wall time with workers that must start (cold) and with those that have
read       a JSONL file whose rows are held is read, and the 256 tasks of the first step are drawn; size: rows of about 1 kB
index      a JSONL file whose rows are not held is opened and the tasks of three steps are drawn, in a process of its own;
           size: rows of 4 kB. MB: peak memory beyond imports; "again": a process that finds the index
start      a run with a tiny model until it has made one step and ended, imports included; size: rows of 4 kB. MB: peak memory
           of the process
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import math
import sys
from typing import Any

from benchmarks.harness import log, make_parser, markdown, new_report, write_report
from benchmarks.scale_parts import PARTS, Measured


def exponent(rows: list[Measured]) -> float:
    """Slope of log seconds over log size between the last two sizes; NaN for a single one."""
    if len(rows) < 2:
        return math.nan
    (small, large) = rows[-2:]
    return math.log(max(large.seconds, 1e-9) / max(small.seconds, 1e-9)) / math.log(large.size / small.size)


def measure(name: str, largest: int | None) -> list[Measured]:
    """The rows of a part, in ascending sizes."""
    part = PARTS[name]
    sizes = [size for size in part.sizes if largest is None or size <= largest] or list(part.sizes[:1])
    rows = []
    for size in sizes:
        log(f"{name} {size:,}")
        rows.append(part.measure(size))
    return rows


def table(name: str, rows: list[Measured]) -> str:
    """A part's rows, and its exponent."""
    notes = sorted({key for row in rows for key in row.more})
    cells = [
        [name, f"{row.size:,}", f"{row.seconds:.4f}", *(f"{row.more.get(key, math.nan):.4g}" for key in notes)]
        for row in rows
    ]
    return f"{markdown(['part', 'size', 'CPU s', *notes], cells)}\nexponent {exponent(rows):.2f}\n"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "scale")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--largest", type=int, help="skip sizes above this one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report: dict[str, Any] = new_report("scale", args, parts={})
    for name in args.parts:
        rows = measure(name, args.largest)
        report["parts"][name] = {"exponent": exponent(rows), "rows": [row._asdict() for row in rows]}
        print(table(name, rows), flush=True)
        write_report(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
