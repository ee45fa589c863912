"""Correctness of a backend: linear_logprob and pact_loss against fp64 at sizes where kernels tend to fail.

python -m benchmarks.correctness                    the backend of the device: triton on CUDA, else cpp, else torch
python -m benchmarks.correctness --device cpu --backend torch --out correctness.json

Errors are relative to backend "torch" in fp64. The limit is twice the error of plain torch (full logits, autograd) in the
same dtype, and 5e-3 nats RMS for log-probs. A second call must give the same bits. Needs no pytest.

Exit status 1: a case fails, or the backend is not available.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import (
    Case,
    add_device_option,
    exit_status,
    failure,
    log,
    make_parser,
    markdown,
    new_report,
    write_report,
)
from pact_fast.kernels import LossTokens, backends, linear_logprob, pact_loss

FACTOR, FLOOR, LOGPROB_RMS = 2.0, 4e-6, 5e-3
ENTROPY_COEF = 0.01
Tensor = torch.Tensor
Values = dict[str, Tensor]


@dataclass(frozen=True)
class KernelCase(Case):
    """Sizes, dtype and options of one call."""

    name: str
    n: int
    d: int
    v: int
    dtype: str = "bfloat16"
    lift: tuple[float, float] = (0.0, 20.0)  # range by which the target's logit is raised: probabilities up to 1
    options: tuple[str, ...] = field(default=())  # of "bias", "softcap", "temperature" (one per row), "masked"

    def tiny(self) -> KernelCase:
        """The same case at a small size; odd sizes stay odd."""
        return KernelCase(
            self.name, 40 + self.n % 2, 32, 1003 if self.v % 2 else 1024, self.dtype, self.lift, self.options
        )


CASES = [
    KernelCase("plain", 4096, 1024, 32_768),
    KernelCase("plain", 4096, 1024, 32_768, "float32"),
    KernelCase("plain", 4096, 1024, 32_768, "float16"),
    KernelCase("V of Qwen3", 2048, 1024, 151_936),
    KernelCase("odd V", 2048, 256, 1003),
    KernelCase("odd V", 2048, 256, 1003, "float32"),
    KernelCase("more than 65,535 rows", 70_001, 128, 1003),
    KernelCase("N·V > 2³¹", 16_384, 64, 151_936),
    KernelCase("bias, softcap, temperatures", 2047, 512, 50_257, options=("bias", "softcap", "temperature")),
    KernelCase("bias, softcap, temperatures", 2047, 512, 50_257, "float32", options=("bias", "softcap", "temperature")),
    KernelCase("p → 1", 2048, 256, 32_768, "float32", lift=(25.0, 45.0)),
    KernelCase("p → 1", 2048, 256, 32_768, lift=(25.0, 45.0)),
    KernelCase("all rows masked", 1024, 128, 1003, options=("masked",)),
]


class Inputs:
    """Arguments of both calls; hidden, weight and bias (None without "bias") are leaves."""

    def __init__(self, case: KernelCase, device: torch.device):
        rng = torch.Generator(device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, device=device)

        def rand(n: int) -> Tensor:
            return torch.rand(n, generator=rng, device=device)

        n, dtype = case.n, getattr(torch, case.dtype)
        weight = randn(case.v, case.d) * (3.0 / case.d**0.5)
        self.target = torch.randint(case.v, (n,), generator=rng, device=device)
        low, high = case.lift
        rows = weight[self.target]
        lift = low + (high - low) * rand(n)[:, None]
        self.hidden = (randn(n, case.d) + lift * rows / rows.square().sum(1, keepdim=True)).to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_()
        self.bias = randn(case.v).to(dtype).requires_grad_() if "bias" in case.options else None
        self.softcap = 30.0 if "softcap" in case.options else None
        self.temperature: float | Tensor = 0.5 + rand(n) if "temperature" in case.options else 1.0
        live = rand(n) < (0.0 if "masked" in case.options else 0.5)
        sft = rand(n) < 0.2
        self.rl_weight = live / n
        self.sft_weight = (sft & live) / n
        self.advantage = randn(n)
        # masked rows: a ratio that overflows; live rows: NaN, the current policy, a ratio of exactly 1
        self.old = torch.where(live, torch.nan, -5000.0)
        self.g, self.h = randn(n) / n, 0.1 * randn(n) / n

    def tokens(self) -> LossTokens:
        """The loss table, N rows: policy and SFT terms, one sequence."""
        zeros = torch.zeros_like(self.target)
        return LossTokens(
            row=torch.arange(len(zeros), device=zeros.device), target=self.target, context=zeros, component=zeros,
            sequence=zeros, advantage=self.advantage, old_logprob=self.old, rl_weight=self.rl_weight,
            sft_weight=self.sft_weight,
        )  # fmt: skip

    def leaves(self, double: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """(hidden [N, D], weight [V, D], bias [V] or None), differentiable; in fp64 with `double`."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().double().requires_grad_() if double else t

        return leaf(self.hidden), leaf(self.weight), None if self.bias is None else leaf(self.bias)

    def head(self) -> dict[str, Any]:
        """Temperature and soft-cap, as arguments of the kernels."""
        return {"temperature": self.temperature, "softcap": self.softcap}


def run_logprob(inputs: Inputs, backend: str, double: bool = False) -> Values:
    """Log-probs, entropies and gradients by `linear_logprob`."""
    hidden, weight, bias = leaves = inputs.leaves(double)
    options = inputs.head() | {"bias": bias, "backend": backend}
    out = linear_logprob(hidden, weight, inputs.target, entropy=True, **options)
    entropy = out.entropy
    assert entropy is not None
    loss = (inputs.g * out.logprob + inputs.h * entropy).sum()
    return {"logprob": out.logprob.detach(), "entropy": entropy.detach(), **_gradients(loss, leaves)}


def run_loss(inputs: Inputs, backend: str, double: bool = False) -> Values:
    """Log-probs, entropies, loss and gradients by `pact_loss`."""
    hidden, weight, bias = leaves = inputs.leaves(double)
    options = inputs.head() | {"bias": bias, "backend": backend, "entropy_coef": ENTROPY_COEF}
    out = pact_loss(hidden, weight, inputs.tokens(), **options)
    return {"logprob": out.logprob, "entropy": out.entropy, "loss": out.loss.detach(), **_gradients(out.loss, leaves)}


def run_torch(inputs: Inputs, call: str) -> Values:
    """The same call in plain torch: logits in the dtype of the inputs, softmax in fp32, autograd."""
    hidden, weight, bias = leaves = inputs.leaves(double=False)
    z = torch.nn.functional.linear(hidden, weight, bias).float()
    if inputs.softcap:
        z = inputs.softcap * torch.tanh(z / inputs.softcap)
    z = z / (inputs.temperature[:, None] if isinstance(inputs.temperature, Tensor) else inputs.temperature)
    log_p = z.log_softmax(-1)
    del z
    logprob = log_p.gather(1, inputs.target[:, None]).squeeze(1)
    entropy = -torch.linalg.vecdot(log_p.exp(), log_p)
    if call == "linear_logprob":
        loss = (inputs.g * logprob + inputs.h * entropy).sum()
    else:  # at ratio 1 the policy term is −A, and its derivative by the log-prob is −A
        ratio = (logprob - logprob.detach()).exp()
        rl = -inputs.rl_weight * (ratio * inputs.advantage + ENTROPY_COEF * entropy)
        loss = rl.sum() - (inputs.sft_weight * logprob).sum()
    values = {"logprob": logprob.detach(), "entropy": entropy.detach(), **_gradients(loss, leaves)}
    return values if call == "linear_logprob" else values | {"loss": loss.detach()}


def _gradients(loss: Tensor, leaves: tuple[Tensor | None, ...]) -> Values:
    names = [name for name, leaf in zip(("dx", "dw", "db"), leaves, strict=True) if leaf is not None]
    return dict(zip(names, torch.autograd.grad(loss, [t for t in leaves if t is not None]), strict=True))


def errors(values: Values, exact: Values) -> dict[str, float]:
    """Errors against exact values.

    Of log-probs and entropies the largest and the RMS, in nats; of others relative, in the Frobenius norm.
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        off, reference = value.detach().double() - exact[name].detach(), exact[name].detach().norm()
        if name in ("logprob", "entropy"):
            found |= {f"{name}_max": float(off.abs().max()), f"{name}_rms": float(off.square().mean().sqrt())}
        else:
            found[name] = float(off.norm() / reference) if reference else float(off.norm())
    return found


def check(case: KernelCase, call: str, backend: str, device: torch.device) -> dict[str, Any]:
    """Errors of one call and of plain torch, and whether a second call gives the same bits."""
    inputs = Inputs(case, device)
    run = run_loss if call == "pact_loss" else run_logprob
    begin = time.perf_counter()
    ours, again = run(inputs, backend), run(inputs, backend)
    same = [bool(torch.equal(ours[name], again[name])) for name in ours]
    del again
    exact = run(inputs, "torch", double=True)
    found = errors(ours, exact)
    own = errors(run_torch(inputs, call), exact)
    failures = [
        f"{key} {error:.3g} is above {limit:.3g}"
        for key, error in found.items()
        if not error <= (limit := _limit(key, own[key]))
    ]
    failures += [f"{name} differs from run to run" for name, equal in zip(ours, same, strict=True) if not equal]
    if "masked" in case.options and call == "pact_loss":
        failures += [f"{name} is not exactly 0" for name in ("loss", "dx", "dw") if ours[name].any()]
    result = {"case": case.name, "call": call, "N": case.n, "D": case.d, "V": case.v, "dtype": case.dtype}
    seconds = round(time.perf_counter() - begin, 2)
    return result | {"errors": found, "torch_own": own, "failures": failures, "seconds": seconds}


def _limit(key: str, own: float) -> float:
    limit = max(FACTOR * own, FLOOR)
    return min(limit, LOGPROB_RMS) if key == "logprob_rms" else limit


def default_backend(device: torch.device) -> str:
    """The fastest backend that works on a device."""
    if device.type == "cuda":
        return "triton"
    return "cpp" if backends().get("cpp") == "ready" else "torch"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "correctness")
    add_device_option(parser)
    parser.add_argument("--backend", choices=list(backends()), help="(default: that of the device)")
    parser.add_argument("--tiny", action="store_true", help="all cases at small sizes (always so on the CPU)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    device = torch.device(args.device)
    backend = args.backend or default_backend(device)
    report = new_report("correctness", args, backend=backend, results=[], failures=[])
    state = backends()[backend]
    if state != "ready":
        report["failures"].append(f"backend {backend}: {state}")
    for case in CASES if state == "ready" else []:
        case = case.tiny() if args.tiny or args.device == "cpu" else case
        for call in ("linear_logprob", "pact_loss"):
            label = f"{call}, {case.name}, {case.dtype}, N={case.n} D={case.d} V={case.v}"
            log(label)
            try:
                result = check(case, call, backend, device)
            except Exception as error:  # the other cases still count
                result = {"case": case.name, "call": call, "failures": [failure(error)]}
            report["results"].append(result)
            report["failures"] += [f"{label}: {line}" for line in result["failures"]]
            write_report(report, args.out)
    write_report(report, args.out)
    print(table(report["results"]))
    return exit_status(report["failures"])


def table(results: list[dict[str, Any]]) -> str:
    """One row per call; cells hold our error / plain torch's error."""
    keys = ("logprob_max", "logprob_rms", "entropy_max", "dx", "dw", "db")
    lines = []
    for r in (r for r in results if "errors" in r):
        cells = [f"{r['errors'][k]:.1e} / {r['torch_own'][k]:.1e}" if k in r["errors"] else "" for k in keys]
        lines.append([r["call"], r["case"], r["dtype"], *cells, "FAIL" if r["failures"] else "ok"])
    return markdown(["call", "case", "dtype", *(f"{key} / torch" for key in keys), ""], lines)


if __name__ == "__main__":
    sys.exit(main())
