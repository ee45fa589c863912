"""Language-model head: time, memory and error of our backends and other projects, on the same tensors.

python -m benchmarks.head                          CUDA: heads of Qwen3 and Llama 3; CPU: N=2048 D=1024 V=32768
python -m benchmarks.head --shapes qwen3-8b 4096x2048x50304 --fractions 1 0.5 --out head.json

Columns, next to the three GEMMs that no head can avoid (method "gemms": z = XWᵀ, dX = dZ·W, dW = dZᵀX):

forward ms      log-probs of all tokens without gradients (kind ce: the loss); median over rounds
fwd+bwd ms      loss and the gradients of hidden states and weight; median over rounds
x GEMMs         fwd+bwd relative to "gemms": median over rounds of the ratio within a round
extra … MiB     peak memory beyond inputs and gradients. CUDA: allocator peak, beyond what was allocated before the
                method's first call. CPU: resident memory of a process of its own, after a warm-up on few rows
logp, dX, dW    errors against fp64 on the first 256 tokens: log-prob in nats, gradients as ‖a − b‖/‖b‖
setting         the fastest of the method's settings, found by trying

Kind rl: policy loss. Kind ce: heads that have cross entropy only; inactive tokens are their ignore_index. Methods take
part in every round, in rotating order; those that take over ten times the GEMMs, in the first three. Compilation and
warm-up are not timed.

function_to_built_in: time of a loss that autograd differentiates, relative to the built-in rule, with
    OMP_NUM_THREADS=1 python -m benchmarks.head --shapes 2048x256x8192 --fractions 1 --no-memory --rounds 100 \
        --cpu-time --methods "pact cpp" "pact cpp, loss as a function"
    Short calls and many rounds: where other programs run beside it, a call differs from the next by a quarter.

Exit status 1: one of our backends fails, or its error is above twice that of plain torch in the same dtype.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks.harness import (
    Case,
    add_case_options,
    add_clock_option,
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
from benchmarks.head_methods import METHODS, HeadMethod, buffer, eager, policy_loss
from benchmarks.head_problem import WIDTHS, HeadProblem, make_problem
from benchmarks.measure import MIB, PeakMemory, median_ratio, milliseconds, paired_rounds
from pact_fast.kernels import release_memory

ERROR_ROWS = 256
ERROR_FACTOR = 2.0  # limit of our error, relative to plain torch's in the same dtype
ERROR_FLOOR = 4e-6  # nats, or relative: fp32 rounding of logits of size 20; below it the factor does not apply
LOGPROB_RMS = 5e-3  # nats; limit of a log-prob's RMS error, independent of plain torch's
SLOW = 10.0  # times the GEMMs
FUNCTION, BUILT_IN = "pact cpp, loss as a function", "pact cpp"
COLUMNS = ("method", "kind", "forward ms", "fwd+bwd ms", "x GEMMs", "extra fwd MiB", "extra fwd+bwd MiB",
           "logp max", "logp rms", "dX", "dW", "setting")  # fmt: skip

Errors = dict[str, float | None]


@dataclass(frozen=True)
class HeadCase(Case):
    """A head of shape (N, D, V) whose loss is on a fraction of the N tokens."""

    name: str
    shape: tuple[int, int, int]
    dtype: str
    fraction: float

    def problem(self, device: torch.device) -> HeadProblem:
        """The tensors of the case, on a device."""
        return make_problem(self.shape, getattr(torch, self.dtype), device, self.fraction)

    def __str__(self) -> str:
        n, d, v = self.shape
        return f"{self.name}: N={n} D={d} V={v}, {self.dtype}, {self.fraction:g} of the tokens active"


def measure_case(
    case: HeadCase, device: torch.device, names: list[str], rounds: int, memory: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:  # fmt: skip
    """Results of one case: a row for each method, with the reason in place of numbers where it does not run.

    Args:
        case: Shape, dtype and fraction of active tokens.
        device: Where to measure.
        names: Of METHODS.
        rounds: Paired rounds.
        memory: Whether to measure peak memory.
        clock: Of `paired_rounds`.
    """
    problem = case.problem(device)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        log(f"  {name}")
        rows[name] = _prepare(name, case, problem, memory)
    live = [name for name in names if rows[name]["status"] == "ok"]
    _time(rows, live, problem, rounds, clock)
    references = {kind: _reference(problem, kind) for kind in ("rl", "ce")}
    torch_own = _errors(METHODS["eager"], {}, problem, references)
    for name in live:
        if METHODS[name].kind != "floor":
            try:
                rows[name]["errors"] = _errors(METHODS[name], rows[name]["setting"], problem, references)
            except Exception as error:
                rows[name] |= _failed(error)
    buffer.cache_clear()
    failures = [line for name in names if METHODS[name].ours for line in _judge(name, rows[name], torch_own)]
    n, d, v = case.shape
    return {
        "case": str(case),
        "shape": {"name": case.name, "N": n, "D": d, "V": v},
        "dtype": case.dtype,
        "fraction": case.fraction,
        "torch_own_errors": torch_own,
        "rows": [{"method": name, "kind": METHODS[name].kind, **row} for name, row in rows.items()],
        "verdict": _verdict(rows),
        "failures": failures,
    }


def _prepare(name: str, case: HeadCase, problem: HeadProblem, memory: bool) -> dict[str, Any]:
    """Warm up, choose the fastest setting, measure peak memory."""
    method = METHODS[name]
    reason = method.missing(problem)
    if reason:
        return {"status": reason}
    cuda = problem.hidden.is_cuda
    held = torch.cuda.memory_allocated() if cuda else 0
    try:
        trials = []
        for setting in method.settings(problem):
            _forward(method, problem, setting)
            _step(method, problem, setting)
            call = lambda setting=setting: _step(method, problem, setting)  # noqa: E731
            trials.append((milliseconds(call, problem.hidden.device), setting))
        trial_ms, setting = min(trials, key=lambda trial: trial[0])
        row: dict[str, Any] = {"status": "ok", "setting": setting, "trial_ms": trial_ms}
        if memory and method.kind != "floor":
            row |= _extra(method, setting, problem, held) if cuda else _extra_in_process(name, setting, case, problem)
        return row
    except Exception as error:  # a row of the table; _judge decides whether it is a failure
        return _failed(error)
    finally:
        problem.clear()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def _failed(error: Exception) -> dict[str, Any]:
    return {"status": failure(error), "failed": True}


def _forward(method: HeadMethod, problem: HeadProblem, setting: dict[str, Any]) -> torch.Tensor | None:
    with torch.no_grad():
        return method.forward(problem, **setting)


def _step(method: HeadMethod, problem: HeadProblem, setting: dict[str, Any]) -> torch.Tensor | None:
    problem.clear()
    return method.step(problem, **setting)


def _time(
    rows: dict[str, dict[str, Any]], live: list[str], problem: HeadProblem, rounds: int, clock: Callable[[], float]
) -> None:
    if not live:
        return
    base = "gemms" if "gemms" in live else None
    count = rounds_per_method({name: rows[name].pop("trial_ms") for name in live}, base, SLOW, rounds)
    for column, call in (("forward_ms", _forward), ("both_ms", _step)):
        calls = {
            name: lambda name=name, call=call: call(METHODS[name], problem, rows[name]["setting"]) for name in live
        }
        times = paired_rounds(calls, count, problem.hidden.device, problem.clear, clock)
        for name in live:
            rows[name][column] = {"median": statistics.median(times[name]), "rounds": times[name]}
            if base:
                rows[name][column]["ratio_to_gemms"] = median_ratio(times[name], times[base])
    problem.clear()


def _extra(
    method: HeadMethod, setting: dict[str, Any], problem: HeadProblem, held: int | None = None
) -> dict[str, Any]:
    """Peak memory of one forward and one step, with the memory that the method has kept since `held` bytes were allocated."""
    extra: dict[str, Any] = {}
    gradients = {"extra_forward_bytes": 0, "extra_both_bytes": problem.gradient_bytes}
    for (key, expected), call in zip(gradients.items(), (_forward, _step), strict=True):
        problem.clear()
        release_memory()  # scratch that ours caches between calls counts
        with PeakMemory(problem.hidden.device) as peak:
            call(method, problem, setting)
        kept = peak.before - held if held is not None and peak.before is not None else 0
        extra[key] = None if peak.bytes is None else peak.bytes + kept - expected
    return extra


def _extra_in_process(name: str, setting: dict[str, Any], case: HeadCase, problem: HeadProblem) -> dict[str, Any]:
    index = METHODS[name].settings(problem).index(setting)
    return probe_in_process("head", {"method": name, "case": case.request(), "setting": index}, note="extra_note")


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """`_extra` of one method on the CPU, in this fresh process."""
    method = METHODS[request["method"]]
    problem = HeadCase(**request["case"]).problem(torch.device("cpu"))
    setting = method.settings(problem)[request["setting"]]
    _ = problem.labels, problem.advantage, problem.token_weight, problem.tokens  # inputs, not extra memory
    warm = problem if method.compiled else problem.subset(ERROR_ROWS)
    _forward(method, warm, setting)
    _step(method, warm, setting)
    warm.clear()
    del warm
    return _extra(method, setting, problem)


class Reference(NamedTuple):
    """fp64 results for the first ERROR_ROWS tokens: log-probs [n], dX [n, D], dW [V, D]."""

    logprob: torch.Tensor
    dx: torch.Tensor
    dw: torch.Tensor


def _reference(problem: HeadProblem, kind: str) -> Reference:
    exact = problem.subset(ERROR_ROWS).double()
    logprob = eager(exact)
    loss = policy_loss(exact, logprob) if kind == "rl" else -logprob[exact.active].mean()
    return Reference(logprob.detach(), *torch.autograd.grad(loss, (exact.hidden, exact.weight)))


def _errors(
    method: HeadMethod, setting: dict[str, Any], problem: HeadProblem, references: dict[str, Reference]
) -> Errors:
    """Errors of gradients, and of log-probs: the larger of the forward pass's and the step's."""
    few = problem.subset(ERROR_ROWS)
    exact = references[method.kind]
    few.clear()
    outputs = [method.step(few, **setting)]
    dx, dw = few.hidden.grad, few.weight.grad
    few.clear()
    with torch.no_grad():
        outputs.append((method.logprob or method.forward)(few, **setting))
    off = [(out.detach().double() - exact.logprob).flatten() for out in outputs if out is not None]
    errors: Errors = {
        "logprob_max": max(float(d.abs().max()) for d in off),
        "logprob_rms": max(float(d.square().mean().sqrt()) for d in off),
    }
    for key, ours, reference in (("dx", dx, exact.dx), ("dw", dw, exact.dw)):
        errors[key] = None if ours is None else float((ours.double() - reference).norm() / reference.norm())
    return errors


def _judge(name: str, row: dict[str, Any], torch_own: Errors) -> list[str]:
    """Failures of a row of ours; none where its backend is not available on this machine."""
    if row["status"] != "ok":
        return [f"{name}: {row['status']}"] if row.get("failed") else []
    failures = []
    for key, own in torch_own.items():
        limit = max(ERROR_FACTOR * (own or 0.0), ERROR_FLOOR)
        limit = min(limit, LOGPROB_RMS) if key == "logprob_rms" else limit
        error = row["errors"][key]
        if error is None or not error <= limit:
            failures.append(f"{name}: {key} {error} is above {limit:.3g}; plain torch in this dtype: {own:.3g}")
    return failures


def _verdict(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Our fastest backend compared with the GEMMs, with eager's memory and with the fastest other project."""
    timed = {name: row["both_ms"]["median"] for name, row in rows.items() if "both_ms" in row}
    ours = [name for name in timed if METHODS[name].ours]
    peers = [name for name in timed if not METHODS[name].ours and METHODS[name].kind != "floor"]
    if not ours:
        return {}
    best = min(ours, key=timed.__getitem__)
    verdict: dict[str, Any] = {"ours": best, "ratio_to_gemms": rows[best]["both_ms"].get("ratio_to_gemms")}
    if peers:
        fastest = min(peers, key=timed.__getitem__)
        rounds = (rows[name]["both_ms"]["rounds"] for name in (best, fastest))
        verdict |= {"fastest_peer": fastest, "ratio_to_fastest_peer": median_ratio(*rounds)}
    if {FUNCTION, BUILT_IN} <= timed.keys():
        verdict["function_to_built_in"] = median_ratio(*(rows[n]["both_ms"]["rounds"] for n in (FUNCTION, BUILT_IN)))
    memory, eagers = (rows.get(name, {}).get("extra_both_bytes") for name in (best, "eager"))
    if memory is not None and eagers:
        verdict["memory_to_eager"] = memory / eagers
    return verdict


def table(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        if row["status"] != "ok":
            lines.append([row["method"], row["kind"], *[""] * (len(COLUMNS) - 3), row["status"]])
            continue
        times, errors = row["both_ms"], row.get("errors", {})
        extra = [row.get(key) for key in ("extra_forward_bytes", "extra_both_bytes")]
        lines.append([
            row["method"], row["kind"],
            number(row["forward_ms"]["median"], ".4g"), number(times["median"], ".4g"),
            number(times.get("ratio_to_gemms"), ".2f"),
            *(number(None if size is None else size / MIB, ".0f") for size in extra),
            *(number(errors.get(key), ".1e") for key in ("logprob_max", "logprob_rms", "dx", "dw")),
            settings_text(row["setting"]),
        ])  # fmt: skip
    verdict = ", ".join(f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in result["verdict"].items())
    return f"\n{result['case']}\n\n{markdown(list(COLUMNS), lines)}\n\n{verdict}"


def parse_shape(text: str, rows: int) -> tuple[str, tuple[int, int, int]]:
    """(name, (N, D, V)) of a name of WIDTHS, with N = `rows`, or of NxDxV."""
    if text in WIDTHS:
        return text, (rows, *WIDTHS[text])
    try:
        n, d, v = map(int, text.lower().split("x"))
    except ValueError:
        raise SystemExit(f"--shapes {text}: expected one of {', '.join(WIDTHS)}, or NxDxV") from None
    return text, (n, d, v)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "head")
    add_device_option(parser)
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help=f"of {', '.join(WIDTHS)}, or NxDxV (default: all models; CPU: cpu)"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="tokens of the named shapes (default: 16384; CPU: 2048)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"), help="(default: bfloat16; CPU: float32, too)"
    )
    parser.add_argument(
        "--fractions", nargs="+", type=float, default=[1.0, 0.5, 0.25], metavar="F",
        help="fractions of tokens that have a loss (default: 1 0.5 0.25)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
        help=f"default: all of {', '.join(METHODS)}",
    )  # fmt: skip
    add_clock_option(parser)
    add_case_options(parser, rounds=7)
    args = parser.parse_args(argv)
    on_cuda = args.device == "cuda"
    args.shapes = args.shapes or ([name for name in WIDTHS if name != "cpu"] if on_cuda else ["cpu"])
    args.rows = args.rows or (16_384 if on_cuda else 2048)
    args.dtypes = args.dtypes or (["bfloat16"] if on_cuda else ["bfloat16", "float32"])
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.probe:
        print(json.dumps(probe(json.loads(args.probe))))
        return 0
    cases = [
        HeadCase(*parse_shape(shape, args.rows), dtype, fraction)
        for shape in args.shapes
        for dtype in args.dtypes
        for fraction in args.fractions
    ]
    compiled_for: tuple[object, ...] | None = None

    def measure(case: HeadCase) -> dict[str, Any]:
        nonlocal compiled_for
        if compiled_for != (case.shape, case.dtype):
            torch._dynamo.reset()  # else many shapes exceed the recompile limit
            compiled_for = (case.shape, case.dtype)
        return measure_case(case, torch.device(args.device), args.methods, args.rounds, not args.no_memory, args.clock)

    report = new_report("head", args, device=args.device, rounds=args.rounds, clock=args.clock.__name__)
    return run_cases(args, report, cases, measure, table)


if __name__ == "__main__":
    sys.exit(main())
