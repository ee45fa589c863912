"""How fast is the language-model head? Our back-ends and the peers in the same run, on the same tensors.

python benchmarks/head.py                                    on CUDA: Qwen3 and Llama-3 heads; on CPU: 2048 x 1024 x 32768
python benchmarks/head.py --shapes qwen3-8b 4096x2048x50304 --fractions 1 0.5 --out head.json

Per method, beside the three GEMMs that no head can avoid (z = XWᵀ, dX = dZ·W, dW = dZᵀX):

forward      log-probs of all tokens without gradients (CE heads: the loss), ms, median over the rounds
both         loss and gradients of hidden and weight, ms; x GEMMs: median over the rounds of the ratio within a round
extra        peak memory beyond inputs and gradients (the gradients in the dtype of their leaves), MiB. CUDA: the
             allocator's peak over what was allocated before the method's first call. CPU: resident memory in a
             process of its own over what it was before the call, after a warm-up on few rows (compiled: on all)
errors       against fp64 on the first 256 tokens: log-prob in nats, gradients as ‖a − b‖/‖b‖

Every method takes part in every round, in rotating order; one that takes ten times the GEMMs or longer, in the first
three. Compilation and warm-up are not timed. Of a method's settings the fastest is taken (found by trying, and named in
the table). kind "ce": heads without a policy loss get mean cross entropy with the inactive rows as ignore_index.

The exit status is 1 when one of our back-ends fails or its error is more than twice that of plain torch in the dtype.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))  # a script among its siblings, from wherever it is imported

from measure import (
    MALLOC,
    MIB,
    PeakMemory,
    add_run_options,
    failure,
    markdown,
    median_ratio,
    milliseconds,
    paired_rounds,
    run_cases,
    stamp,
)
from peers import METHODS, WIDTHS, Method, Problem, buffer, eager, make_problem, policy_loss

from pact_fast.kernels import release_memory

ERROR_ROWS = 256
ERROR_FACTOR = 2.0  # ours may be this much worse than torch's own same-dtype code
ERROR_FLOOR = 4e-6  # nats, or relative: fp32 rounding of logits of size 20, below which factors mean nothing
LOGPROB_RMS = 5e-3  # nats; the most a log-prob may be off, whatever torch's own does
SLOW, SLOW_ROUNDS = 10.0, 3
COLUMNS = ("method", "kind", "forward ms", "both ms", "x GEMMs", "extra fwd MiB", "extra both MiB",
           "logp max", "logp rms", "dX", "dW", "setting")  # fmt: skip

Errors = dict[str, float | None]


class Case(NamedTuple):
    name: str
    shape: tuple[int, int, int]
    dtype: str
    fraction: float

    def problem(self, device: torch.device) -> Problem:
        return make_problem(self.shape, getattr(torch, self.dtype), device, self.fraction)

    def __str__(self) -> str:
        n, d, v = self.shape
        return f"{self.name}: N={n} D={d} V={v}, {self.dtype}, {self.fraction:g} of the rows active"


def measure_case(
    case: Case, device: torch.device, names: list[str], rounds: int, memory: bool, log: Callable[..., None]
) -> dict[str, Any]:
    """Every row of the table of one case, with the reason in place of the numbers where a method does not run."""
    problem = case.problem(device)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        log(f"  {name}")
        rows[name] = _prepare(name, case, problem, memory)
    live = [name for name in names if rows[name]["status"] == "ok"]
    _time(rows, live, problem, rounds)
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


def _prepare(name: str, case: Case, problem: Problem, memory: bool) -> dict[str, Any]:
    """Warm up, choose the fastest setting, measure the memory."""
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
    except Exception as error:  # a peer's failure is a row of the table
        return _failed(error)
    finally:
        problem.clear()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def _failed(error: Exception) -> dict[str, Any]:
    return {"status": failure(error), "failed": True}


def _forward(method: Method, problem: Problem, setting: dict[str, Any]) -> torch.Tensor | None:
    with torch.no_grad():
        return method.forward(problem, **setting)


def _step(method: Method, problem: Problem, setting: dict[str, Any]) -> torch.Tensor | None:
    problem.clear()
    return method.step(problem, **setting)


def _time(rows: dict[str, dict[str, Any]], live: list[str], problem: Problem, rounds: int) -> None:
    if not live:
        return
    floor = rows["gemms"]["trial_ms"] if "gemms" in live else 0.0
    count = {
        name: min(rounds, SLOW_ROUNDS) if floor and rows[name].pop("trial_ms") > SLOW * floor else rounds
        for name in live
    }
    for column, call in (("forward_ms", _forward), ("both_ms", _step)):
        calls = {
            name: lambda name=name, call=call: call(METHODS[name], problem, rows[name]["setting"]) for name in live
        }
        times = paired_rounds(calls, count, problem.hidden.device, between=problem.clear)
        for name in live:
            rows[name][column] = {"median": statistics.median(times[name]), "rounds": times[name]}
            if "gemms" in live:
                rows[name][column]["ratio_to_gemms"] = median_ratio(times[name], times["gemms"])
    problem.clear()


def _extra(method: Method, setting: dict[str, Any], problem: Problem, held: int | None = None) -> dict[str, Any]:
    """Peaks of one forward and one step; what the method has kept since `held` bytes were allocated counts too."""
    extra: dict[str, Any] = {}
    gradients = {"extra_forward_bytes": 0, "extra_both_bytes": problem.gradient_bytes}
    for (key, expected), call in zip(gradients.items(), (_forward, _step), strict=True):
        problem.clear()
        release_memory()  # what ours keeps from the call before counts as much as what it takes anew
        with PeakMemory(problem.hidden.device) as peak:
            call(method, problem, setting)
        kept = peak.before - held if held is not None and peak.before is not None else 0
        extra[key] = None if peak.bytes is None else peak.bytes + kept - expected
    return extra


def _extra_in_process(name: str, setting: dict[str, Any], case: Case, problem: Problem) -> dict[str, Any]:
    index = METHODS[name].settings(problem).index(setting)
    request = json.dumps({"method": name, "case": case, "setting": index})
    command = [sys.executable, __file__, "--probe", request]
    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return {"extra_note": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """`_extra` of one method on the CPU, in this fresh process."""
    name, shape, dtype, fraction = request["case"]
    method = METHODS[request["method"]]
    problem = Case(name, tuple(shape), dtype, fraction).problem(torch.device("cpu"))
    setting = method.settings(problem)[request["setting"]]
    _ = problem.labels, problem.advantage, problem.token_weight, problem.tokens  # inputs of one method or another
    warm = problem if method.compiled else problem.few(ERROR_ROWS)
    _forward(method, warm, setting)
    _step(method, warm, setting)
    warm.clear()
    del warm
    return _extra(method, setting, problem)


class Reference(NamedTuple):
    logprob: torch.Tensor
    dx: torch.Tensor
    dw: torch.Tensor


def _reference(problem: Problem, kind: str) -> Reference:
    exact = problem.few(ERROR_ROWS).double()
    logprob = eager(exact)
    loss = policy_loss(exact, logprob) if kind == "rl" else -logprob[exact.active].mean()
    return Reference(logprob.detach(), *torch.autograd.grad(loss, (exact.hidden, exact.weight)))


def _errors(method: Method, setting: dict[str, Any], problem: Problem, references: dict[str, Reference]) -> Errors:
    """Largest over all the log-probs that the method gives: those of its forward pass and those of its step."""
    few = problem.few(ERROR_ROWS)
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
    """Why this row of ours is wrong; empty where it is right or its back-end is not live here."""
    if row["status"] != "ok":
        return [f"{name}: {row['status']}"] if row.get("failed") else []
    failures = []
    for key, own in torch_own.items():
        limit = max(ERROR_FACTOR * (own or 0.0), ERROR_FLOOR)
        limit = min(limit, LOGPROB_RMS) if key == "logprob_rms" else limit
        error = row["errors"][key]
        if error is None or not error <= limit:
            failures.append(f"{name}: {key} {error} is above {limit:.3g}; plain torch in this dtype has {own:.3g}")
    return failures


def _verdict(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Our best back-end beside the floor, eager's memory and the fastest peer."""
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
    memory, eagers = (rows.get(name, {}).get("extra_both_bytes") for name in (best, "eager"))
    if memory is not None and eagers:
        verdict["memory_to_eager"] = memory / eagers
    return verdict


def table(result: dict[str, Any]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

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
            ", ".join(f"{key}={value}" for key, value in row["setting"].items()),
        ])  # fmt: skip
    verdict = ", ".join(f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in result["verdict"].items())
    return f"\n{result['case']}\n\n{markdown(list(COLUMNS), lines)}\n\n{verdict}"


def parse_shape(text: str, rows: int) -> tuple[str, tuple[int, int, int]]:
    """A name of WIDTHS, of `rows` rows, or NxDxV."""
    if text in WIDTHS:
        return text, (rows, *WIDTHS[text])
    try:
        n, d, v = map(int, text.lower().split("x"))
    except ValueError:
        raise SystemExit(f"--shapes {text}: not one of {', '.join(WIDTHS)}, nor NxDxV") from None
    return text, (n, d, v)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--shapes", nargs="+", help=f"of {', '.join(WIDTHS)}, or NxDxV")
    parser.add_argument("--rows", type=int, help="N of the named shapes; default 16384, on the CPU 2048")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--fractions", nargs="+", type=float, default=[1.0, 0.5, 0.25], help="of rows that are active")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=7)
    add_run_options(parser)
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
        Case(*parse_shape(shape, args.rows), dtype, fraction)
        for shape in args.shapes
        for dtype in args.dtypes
        for fraction in args.fractions
    ]
    report = {"benchmark": "head", **stamp(args.date, args.commit), "device": args.device, "rounds": args.rounds}
    log = functools.partial(print, file=sys.stderr, flush=True)
    compiled_for: tuple[object, ...] | None = None

    def measure(case: Case) -> dict[str, Any]:
        nonlocal compiled_for
        if compiled_for != (case.shape, case.dtype):
            torch._dynamo.reset()  # else the compiled code of many shapes runs into the recompile limit
            compiled_for = (case.shape, case.dtype)
        return measure_case(case, torch.device(args.device), args.methods, args.rounds, not args.no_memory, log)

    return run_cases(report, cases, measure, table, args.time_limit, args.out)


if __name__ == "__main__":
    sys.exit(main())
