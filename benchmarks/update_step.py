"""How long does one optimizer update take? Every sequence alone, packed, sharing prefixes, and one tree for both contexts.

python benchmarks/update_step.py                                 on CPU: a Qwen3 of 30M; on CUDA: Qwen3-0.6B
python benchmarks/update_step.py --model qwen3-1.7b --shape 4096,4096,1024,8 --only kept tree --out update.json

The same data, the same weights, one loss (update_variants.py): old log-probs when asked for (--old), forward, loss, backward,
gradient clipping, AdamW. Each prompt is a micro-batch of its own. Before anything is timed, every variant's loss and
gradients are compared at a small shape with (a) in fp64: in fp32 to 1e-5, in bf16 to twice the error of (a) in bf16.

seconds      median over rounds; x tree: median over the rounds of the ratio within a round. Every variant once per round,
             in rotating order, after a warm-up of one whole step; one three times as slow as the tree, in the first three
tokens       that the trunk computes, forward and backward
useful/s     tokens that there are if every sequence runs alone, by the seconds: the same numerator for all
peak         memory beyond weights and optimizer state, gradients included, MiB. CUDA: the allocator's peak. CPU: resident
             memory in a process of its own
trunk … rest parts of the same steps, by marks between the phases (CUDA: events): embedding, layers and final norm,
             forward and backward; attention: its share within, from the attention function's call to its return and, in
             the backward pass, from its output's gradient to those of q, k and v; head: logits and loss; rest: packing, tables
floor        of the tree's seconds, the share that its FLOPs (trunk, attention, head) take at the rate of a large matmul
             of the same dtype timed in the same rounds

Status 1: a variant's loss or gradients are off, or one of ours does not run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # a script among its siblings, from wherever it is imported

from measure import MALLOC, MIB, PeakMemory, add_run_options, markdown, median_ratio, paired_rounds, run_cases, stamp
from update_run import CHECKED, DEFAULT_LAYERS, MODELS, Bench, Case, check, reason, time_attention
from update_variants import VARIANTS, Shape, make_problem, token_tree

from pact_fast.batch.flops import work_of_packs
from pact_fast.kernels import LossContext
from pact_fast.model.flops import decoder_flops
from pact_fast.tree import pack

SHAPES = {"cpu": ["1024,1024,256,8"], "cuda": ["4096,4096,1024,8", "1024,2048,1024,8", "8192,2048,1024,8"]}
SLOW, SLOW_ROUNDS = 3.0, 3
MATMUL = {"cpu": 2048, "cuda": 8192}
PHASES = ("trunk", "attention", "head", "optimizer", "rest")
TREE = "tree"
OUT_OF_MEMORY = "out of memory"


def prepare(bench: Bench, name: str, memory: bool) -> dict[str, Any]:
    """Warm up with a whole step, in the first setting that fits into memory, and measure the peak of another."""
    variant = VARIANTS[name]
    for setting in variant.settings(bench.case.shape):
        try:
            begin = time.perf_counter()
            tokens = bench.step(variant, setting)["tokens"]
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            row = {"status": "ok", "setting": setting, "tokens": tokens, "trial_s": time.perf_counter() - begin}
            if memory:
                row |= peak(bench, name, setting) if bench.device.type == "cuda" else peak_in_process(bench.case, name)
            return row
        except torch.OutOfMemoryError:
            continue
        except Exception as error:
            return {"status": reason(error)}
        finally:
            bench.clear()
    return {"status": OUT_OF_MEMORY}


def peak(bench: Bench, name: str, setting: dict[str, int]) -> dict[str, Any]:
    bench.clear()
    with PeakMemory(bench.device) as memory:
        bench.step(VARIANTS[name], setting)
    return {"peak_bytes": memory.bytes}


def peak_in_process(case: Case, name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--probe", json.dumps({"case": case, "name": name})]
    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        return {"peak_note": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """The peak of one variant on the CPU, in this fresh process; the optimizer's state is there before."""
    model, layers, shape, dtype, prompts, old = request["case"]
    bench = Bench(Case(model, layers, Shape(*shape), dtype, prompts, old), torch.device("cpu"))
    variant, data = VARIANTS[request["name"]], bench.problems
    setting = variant.settings(bench.case.shape)[0]
    bench.problems = [make_problem(CHECKED, bench.model.config.vocab_size, seed=0)]
    bench.step(variant, setting)
    bench.problems = data
    return peak(bench, request["name"], setting)


def measure_case(
    case: Case, device: torch.device, args: argparse.Namespace, log: Callable[..., None]
) -> dict[str, Any]:
    """Every row of one case, with the reason in place of the numbers where a variant does not run."""
    names = args.only or list(VARIANTS)
    found, failures = check(case, device, names)
    bench = Bench(case, device)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        log(f"  {name}")
        if "status" in found[name]:
            rows[name] = {"label": VARIANTS[name].label, **found[name]}
            continue
        row = prepare(bench, name, not args.no_memory)
        rows[name] = {"label": VARIANTS[name].label, "errors": found[name], **row}
        if VARIANTS[name].ours and row["status"] not in ("ok", OUT_OF_MEMORY):
            failures.append(f"{name}: {row['status']}")
    time_rows(bench, rows, args.rounds)
    return {
        "case": str(case), **case._asdict(), "shape": case.shape._asdict(),
        "unshared_tokens": case.prompts * case.shape.unshared,
        "rows": [{"variant": name, **row} for name, row in rows.items()],
        "criteria": criteria(rows) if case.model == "30m" else [], "failures": failures,
    }  # fmt: skip


def time_rows(bench: Bench, rows: dict[str, dict[str, Any]], rounds: int) -> None:
    live = [name for name in rows if rows[name]["status"] == "ok"]
    if not live:
        return
    base = TREE if TREE in live else live[-1]
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in live}

    def step(name: str) -> None:
        steps[name].append(bench.step(VARIANTS[name], rows[name]["setting"]))

    calls: dict[str, Callable[[], object]] = {name: functools.partial(step, name) for name in live}
    slow = SLOW * rows[base]["trial_s"]
    count = {name: min(rounds, SLOW_ROUNDS) if rows[name].pop("trial_s") > slow else rounds for name in live}
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
    """Of an update by trees: the trunk with its attention, and 6·D·V for each supervised token."""
    model, case = bench.model, bench.case
    packs = [pack([token_tree(p, tuple(LossContext))[0]], max_tokens=1 << 40) for p in bench.problems]
    trunk = decoder_flops(model, work_of_packs([batch for some in packs for batch in some]))
    head = 6.0 * case.prompts * case.shape.supervised * model.lm_head.weight.numel()
    return (trunk + head) * (4 / 3 if case.old else 1.0)


def criteria(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What an update by the tree is to reach. (a) is a padded batch, as trainers run it; (a') and (c) are the fastest of
    their rows. For (a) one sequence at a time there is no goal: its logits stay in a CPU's cache, and 8 times that is what
    the tree would reach at the full rate of its FLOPs. Its row stands in the table.
    """

    def fastest(*names: str) -> float | None:
        ratios = [rows[name]["ratio_to_tree"] for name in names if rows.get(name, {}).get("ratio_to_tree")]
        return min(ratios, default=None)

    ours, theirs = (rows.get(name, {}).get("peak_bytes") for name in (TREE, "alone"))
    found = [
        ("times (a), padded batches, logits of all positions", fastest("alone"), 8.0),
        ("times (a'), logits of supervised tokens", fastest("kept", "kept-1"), 5.0),
        ("times (c), flat sharing", fastest("flat-pact", "flat-prefix-grouper"), 1.1),
        ("peak memory of (a) to the tree's", theirs / ours if ours and theirs else None, 4.0),
    ]
    return [
        {"what": what, "value": value, "at_least": least, "pass": None if value is None else value >= least}
        for what, value, least in found
    ]


def table(result: dict[str, Any]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    phases = ("old", *PHASES) if result["old"] else PHASES
    header = [
        "variant",
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
        parts["trunk"] += parts["attention"]
        memory = row.get("peak_bytes")
        lines.append([
            row["variant"], row["label"],
            number(row["seconds"], ".4g"), number(row["ratio_to_tree"], ".2f"), str(row["tokens"]),
            number(row["useful_tokens_per_s"], ".4g"), number(None if memory is None else memory / MIB, ".0f"),
            *(number(part, ".3g") for part in parts.values()),
            *(number(row["errors"]["float32"][key], ".0e") for key in ("loss", "gradient")),
            ", ".join(f"{key}={value}" for key, value in row["setting"].items()),
        ])  # fmt: skip
    out = [f"\n{result['case']}\n", markdown(header, lines), ""]
    for row in result["rows"]:
        if row["status"] != "ok":
            out.append(f"{row['variant']}, {row['label']}: {row['status']}")
        if "floor" in row:
            rate = row["matmul_flops_per_s"] / 1e12
            out.append(f"tree: {row['floor']:.0%} of its time is its {row['flops']:.3g} FLOPs at {rate:.3g} TFLOP/s")
    verdict = {True: "pass", False: "FAIL", None: "not measured"}
    for goal in result["criteria"]:
        value = number(goal["value"], ".2f")
        out.append(f"{verdict[goal['pass']]:12} {goal['what']}: {value} (at least {goal['at_least']:g})")
    return "\n".join(out)


def parse_shape(text: str) -> Shape:
    try:
        shape = Shape(*map(int, text.split(",")))
    except (ValueError, TypeError):
        raise SystemExit(f"--shape {text}: want P,Z,L,K or P,Z,L,K,R") from None
    if min(shape[:3]) < 1 or shape.rollouts < 2:
        raise SystemExit(f"--shape {text}: P, Z and L are at least 1, K at least 2")
    return shape


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(MODELS))
    parser.add_argument("--layers", type=int, help="fewer than the model has; default all, 8 of the 36 of qwen3-8b")
    parser.add_argument("--shape", action="append", help="P,Z,L,K or P,Z,L,K,R; may be repeated")
    parser.add_argument("--prompts", type=int, default=1, help="of one update")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--old", action="store_true", help="log-probs of the old policy by a pass without gradients")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    add_run_options(parser)
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
        Case(args.model, args.layers, parse_shape(shape), args.dtype, args.prompts, args.old) for shape in args.shape
    ]
    report = {"benchmark": "update_step", **stamp(args.date, args.commit)}
    report |= {"device": args.device, "rounds": args.rounds}
    log = functools.partial(print, file=sys.stderr, flush=True)
    measure = lambda case: measure_case(case, torch.device(args.device), args, log)  # noqa: E731
    return run_cases(report, cases, measure, table, args.time_limit, args.out)


if __name__ == "__main__":
    sys.exit(main())
