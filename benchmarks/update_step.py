"""One optimizer update: time, memory and tokens of per-sequence training, packing, prefix sharing and token trees.

python -m benchmarks.update_step                      CPU: a Qwen3 of 30M parameters; CUDA: Qwen3-0.6B
python -m benchmarks.update_step --model qwen3-1.7b --shape 4096,4096,1024,8 --only selected-logits tree --out update.json

All methods use the same data, weights and loss (update_problem.py): optional log-probs of the old policy (--old), forward,
loss, backward, gradient clipping, AdamW. Each prompt is a micro-batch. Before anything is timed, loss and gradients of every
method are compared with those of full-logits in fp64 at a small shape: to 1e-5 in fp32, or twice the error of full-logits
itself, if that is more; in bf16 to twice that of full-logits in bf16. Recurrent layers, which transformers computes in fp32
even in an fp64 model, run token by token in the reference (recurrences.py).

seconds      median over rounds. Every method runs once per round, in rotating order, after one step of warm-up; those
             three times as slow as the tree take part in the first three rounds
x tree       time relative to the tree: median over rounds of the ratio within a round
tokens       that the decoder computes, forward and backward
useful/s     tokens without prefix sharing per second: the same numerator for all methods
peak         memory beyond weights and optimizer states, with gradients, MiB. CUDA: allocator peak; CPU: resident memory
             of a process of its own
decoder …    parts of the same steps, by marks at changes of phase (CUDA: events): decoder (embedding, layers, final norm;
             attention included), attention (from the call to its return; in the backward pass, from its output's gradient
             to those of q, k and v), head (logits and loss), optimizer, rest (packing, tables)
floor        fraction of the tree's time that its FLOPs (decoder, attention, head) take at the rate of a large matmul of the
             same dtype, timed in the same rounds

Exit status 1: loss or gradients of a method are wrong, or one of ours does not run.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import (
    add_case_options,
    add_device_option,
    failure,
    log,
    make_parser,
    markdown,
    new_report,
    number,
    probe_in_process,
    rounds_per_method,
    run_cases,
    settings_text,
)
from benchmarks.measure import MIB, PeakMemory, median_ratio, paired_rounds
from benchmarks.update_methods import METHODS
from benchmarks.update_problem import Shape, make_problem, token_tree
from benchmarks.update_run import CHECKED, DEFAULT_LAYERS, MODELS, REFERENCE, Bench, UpdateCase, check, time_attention
from pact_fast.batch.flops import work_of_packs
from pact_fast.kernels import LossContext
from pact_fast.model.device import release_memory
from pact_fast.model.flops import decoder_flops
from pact_fast.tree import pack

SHAPES = {"cpu": ["1024,1024,256,8"], "cuda": ["4096,4096,1024,8", "1024,2048,1024,8", "8192,2048,1024,8"]}
SLOW = 3.0  # times the tree
MATMUL = {"cpu": 2048, "cuda": 8192}
PHASES = ("decoder", "attention", "head", "optimizer", "rest")
TREE = "tree"
OUT_OF_MEMORY = "out of memory"


def prepare(bench: Bench, name: str, memory: bool) -> dict[str, Any]:
    """Warm up with one step, in the first setting that fits into memory, and measure the peak of another step."""
    method = METHODS[name]
    for setting in method.settings(bench.case.shape):
        try:
            begin = time.perf_counter()
            tokens = bench.step(method, setting)["tokens"]
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            row = {"status": "ok", "setting": setting, "tokens": tokens, "trial_s": time.perf_counter() - begin}
            if memory:
                bench.clear()
                release_memory()  # the gigabytes that whole sequences took: a CPU's probe runs beside this process
                row |= (
                    peak(bench, name, setting)
                    if bench.device.type == "cuda"
                    else probe_in_process("update_step", {"case": bench.case.request(), "name": name}, note="peak_note")
                )
            return row
        except torch.OutOfMemoryError:
            continue
        except Exception as error:
            return {"status": failure(error)}
        finally:
            bench.clear()
    return {"status": OUT_OF_MEMORY}


def peak(bench: Bench, name: str, setting: dict[str, int]) -> dict[str, Any]:
    """`peak_bytes` of an update, beyond what was held before."""
    bench.clear()
    with PeakMemory(bench.device) as memory:
        bench.step(METHODS[name], setting)
    return {"peak_bytes": memory.bytes}


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one method on the CPU, in this fresh process; optimizer states are allocated before."""
    bench = Bench(UpdateCase(**request["case"]), torch.device("cpu"))
    method, data = METHODS[request["name"]], bench.problems
    setting = method.settings(bench.case.shape)[0]
    bench.problems = [make_problem(CHECKED, bench.model.config.vocab_size, seed=0)]
    bench.step(method, setting)
    bench.problems = data
    return peak(bench, request["name"], setting)


def measure_case(case: UpdateCase, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Results of one case: a row for each method, with the reason in place of numbers where it does not run."""
    names = args.only or list(METHODS)
    found, failures = check(case, device, names)
    bench = Bench(case, device)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        log(f"  {name}")
        if "status" in found[name]:
            rows[name] = {"label": METHODS[name].label, **found[name]}
            continue
        row = prepare(bench, name, not args.no_memory)
        rows[name] = {"label": METHODS[name].label, "errors": found[name], **row}
        if METHODS[name].ours and row["status"] not in ("ok", OUT_OF_MEMORY):
            failures.append(f"{name}: {row['status']}")
    time_rows(bench, rows, args.rounds)
    return {
        "case": str(case), **case.request(), "shape": case.shape._asdict(),
        "unshared_tokens": case.prompts * case.shape.unshared,
        "rows": [{"variant": name, **row} for name, row in rows.items()],
        "criteria": criteria(rows) if case.model == "30m" else [], "failures": failures,
    }  # fmt: skip


def time_rows(bench: Bench, rows: dict[str, dict[str, Any]], rounds: int) -> None:
    """Time the methods whose status is ok, in paired rounds, and add the results to their rows."""
    live = [name for name in rows if rows[name]["status"] == "ok"]
    if not live:
        return
    base = TREE if TREE in live else live[-1]
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in live}

    def step(name: str) -> None:
        steps[name].append(bench.step(METHODS[name], rows[name]["setting"]))

    calls: dict[str, Callable[[], object]] = {name: functools.partial(step, name) for name in live}
    count = rounds_per_method({name: rows[name].pop("trial_s") for name in live}, base, SLOW, rounds)
    size = MATMUL[bench.device.type]
    a = torch.randn(size, size, device=bench.device).to(bench.model.dtype)
    a @ a
    times = paired_rounds(calls | {"matmul": lambda: a @ a}, count | {"matmul": rounds}, bench.device, bench.clear)
    useful = bench.case.prompts * bench.case.shape.unshared
    for name in live:
        parts = [done["clock"].seconds() for done in steps[name]]
        seconds = statistics.median(times[name]) / 1e3
        rows[name] |= {
            "seconds": seconds,
            "round_ms": times[name],
            "ratio_to_tree": median_ratio(times[name], times[base]) if base == TREE else None,
            "useful_tokens_per_s": useful / seconds,
            "parts_s": {key: statistics.median(part[key] for part in parts) for key in parts[0]},
        }
    if base == TREE:
        flops = tree_flops(bench)
        at_rate = [flops / (2 * size**3) * ms for ms in times["matmul"]]
        rows[TREE] |= {
            "flops": flops,
            "matmul_flops_per_s": 2e3 * size**3 / statistics.median(times["matmul"]),
            "floor": median_ratio(at_rate, times[TREE]),
        }


def tree_flops(bench: Bench) -> float:
    """FLOPs of an update by trees: the decoder with its attention, and 6·D·V for each supervised token."""
    model, case = bench.model, bench.case
    packs = [pack([token_tree(p, tuple(LossContext))[0]], max_tokens=1 << 40) for p in bench.problems]
    decoder = decoder_flops(model, work_of_packs([batch for some in packs for batch in some]))
    head = 6.0 * case.prompts * case.shape.supervised * model.lm_head.weight.numel()
    return (decoder + head) * (4 / 3 if case.old else 1.0)


def criteria(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The project's goals for an update by the tree, at the CPU's default shape.

    full-logits counts as trainers run it, in padded batches. full-logits-b1 has no goal: on a CPU its logits stay in the
    cache, and eight times that is the tree's rate if all its FLOPs ran at the rate of a large matmul.
    """

    def fastest(*names: str) -> float | None:
        ratios = [rows[name]["ratio_to_tree"] for name in names if rows.get(name, {}).get("ratio_to_tree")]
        return min(ratios, default=None)

    ours, theirs = (rows.get(name, {}).get("peak_bytes") for name in (TREE, REFERENCE))
    found = [
        ("times faster than padded batches with logits of all positions", fastest("full-logits"), 8.0),
        (
            "times faster than per sequence with logits of supervised tokens",
            fastest("selected-logits", "selected-logits-b1"),
            5.0,
        ),
        ("times faster than a shared prefix per context", fastest("prefix-pact", "prefix-grouper"), 1.1),
        ("times less peak memory than logits of all positions", theirs / ours if ours and theirs else None, 4.0),
    ]
    return [
        {"what": what, "value": value, "at_least": least, "pass": None if value is None else value >= least}
        for what, value, least in found
    ]


def table(result: dict[str, Any]) -> str:
    phases = ("old", *PHASES) if result["old"] else PHASES
    header = [
        "method",
        "",
        "seconds",
        "x tree",
        "tokens",
        "useful/s",
        "peak MiB",
        *phases,
        "loss",
        "gradient",
        "setting",
    ]
    lines = []
    for row in result["rows"]:
        if row["status"] != "ok":
            continue  # the reason is below
        parts = {phase: row["parts_s"].get(phase, 0.0) for phase in phases}
        parts["decoder"] += parts["attention"]
        memory = row.get("peak_bytes")
        lines.append([
            row["variant"], row["label"],
            number(row["seconds"], ".4g"), number(row["ratio_to_tree"], ".2f"), str(row["tokens"]),
            number(row["useful_tokens_per_s"], ".4g"), number(None if memory is None else memory / MIB, ".0f"),
            *(number(part, ".3g") for part in parts.values()),
            *(number(row["errors"]["float32"][key], ".0e") for key in ("loss", "gradient")),
            settings_text(row["setting"]),
        ])  # fmt: skip
    out = [f"\n{result['case']}\n", markdown(header, lines), ""]
    for row in result["rows"]:
        if row["status"] != "ok":
            out.append(f"{row['variant']}, {row['label']}: {row['status']}")
        if "floor" in row:
            rate = row["matmul_flops_per_s"] / 1e12
            out.append(
                f"tree: {row['flops']:.3g} FLOPs at {rate:.3g} TFLOP/s would take {row['floor']:.0%} of its time"
            )
    verdict = {True: "pass", False: "FAIL", None: "not measured"}
    for goal in result["criteria"]:
        value = number(goal["value"], ".2f")
        out.append(f"{verdict[goal['pass']]:12} {goal['what']}: {value} (at least {goal['at_least']:g})")
    return "\n".join(out)


def parse_shape(text: str) -> Shape:
    """P,Z,L,K or P,Z,L,K,R."""
    try:
        shape = Shape(*map(int, text.split(",")))
    except (ValueError, TypeError):
        raise SystemExit(f"--shape {text}: expected P,Z,L,K or P,Z,L,K,R") from None
    if min(shape[:3]) < 1 or shape.rollouts < 2:
        raise SystemExit(f"--shape {text}: P, Z and L must be at least 1, K at least 2")
    return shape


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "update_step")
    add_device_option(parser)
    parser.add_argument("--model", choices=list(MODELS), help="(default: 30m; CUDA: qwen3-0.6b)")
    parser.add_argument("--layers", type=int, metavar="N", help="use N layers only (default: all; qwen3-8b: 8 of 36)")
    parser.add_argument(
        "--shape", action="append", metavar="P,Z,L,K[,R]",
        help="tokens of prompt, trace and rollout, number of rollouts, tokens of the question restated after the trace; "
        "may be repeated",
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=1, metavar="N", help="prompts per update (default: 1)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--old", action="store_true", help="compute log-probs of the old policy by a pass of their own")
    parser.add_argument(
        "--only", nargs="+", choices=list(METHODS), metavar="METHOD", help=f"default: all of {', '.join(METHODS)}"
    )
    add_case_options(parser, rounds=5)
    args = parser.parse_args(argv)
    on_cuda = args.device == "cuda"
    args.model = args.model or ("qwen3-0.6b" if on_cuda else "30m")
    args.layers = args.layers or DEFAULT_LAYERS.get(args.model, MODELS[args.model]["num_hidden_layers"])
    args.shape = args.shape or SHAPES[args.device]
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    time_attention()
    if args.probe:
        print(json.dumps(probe(json.loads(args.probe))))
        return 0
    cases = [
        UpdateCase(args.model, args.layers, parse_shape(shape), args.dtype, args.prompts, args.old)
        for shape in args.shape
    ]
    report = new_report("update_step", args, device=args.device, rounds=args.rounds)
    return run_cases(args, report, cases, lambda case: measure_case(case, torch.device(args.device), args), table)


if __name__ == "__main__":
    sys.exit(main())
