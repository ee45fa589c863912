"""The softmax passes of the head: every backend against its definition, in fp64 and differentiated by autograd.

An error may be twice that of the same definition in plain fp32 torch. Triton runs on the GPU where there is one, else
interpreted: in a process of its own, because Triton reads TRITON_INTERPRET while it is imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.multiprocessing

from pact_fast.kernels.head.softmax_torch import Pairing, RowStats, compaction_index
from pact_fast.kernels.runtime import build
from tests.support.triton_interpreter import interpreter

EPS = torch.finfo(torch.float32).eps
LONG = 3 * 4096 + 77  # some tiles and an odd rest
# A build with a sanitizer does not vectorise loops: sums of 128 terms are then one running sum, not one per lane.
VECTORISED = "-fsanitize" not in os.environ.get("PACT_FAST_CXXFLAGS", "")


def call(module: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(f"pact_fast.kernels.head.{module}"), name)(*args)


def triton_call(module: str, name: str, *args: Any) -> Any:
    if torch.cuda.is_available():
        return call(module, name, *args)
    return interpreter().submit(call, module, name, *args).result()


@dataclass(frozen=True)
class Backend:
    module: str
    call: Callable[..., Any] = call
    device: str = "cpu"
    needs: str = "torch"
    small_types: bool = True  # whether `out` may be bf16 or fp16

    @property
    def interpreted(self) -> bool:
        return self.call is triton_call and self.device == "cpu"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self.call, self.module, name)


BACKENDS = {
    "torch": Backend("softmax_torch"),
    "cpp": Backend("softmax_cpp", small_types=False),
    "triton": Backend("softmax_triton", triton_call, "cuda" if torch.cuda.is_available() else "cpu", "triton"),
}


@pytest.fixture(params=["torch", "cpp", pytest.param("triton", marks=pytest.mark.slow)])
def rows(request) -> Backend:
    backend = BACKENDS[request.param]
    if request.param == "cpp" and build.status() != "ready":
        pytest.skip(build.status())
    if importlib.util.find_spec(backend.needs) is None:
        pytest.skip(f"needs {backend.needs}: pip install {backend.needs}")
    return backend


@dataclass
class Case:
    """Raw logits and the requests of a loss; partner, own and cross as in Pairing."""

    raw: torch.Tensor
    target: torch.Tensor
    temperature: torch.Tensor
    g: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    h: torch.Tensor | None = None
    kind: str | None = None
    partner: torch.Tensor | None = None
    own: torch.Tensor | None = None
    cross: torch.Tensor | None = None


def example(device, n=6, vocab=1003, spread=4.0, bias=False, softcap=None, temperature=False, entropy=False, kind=None):
    torch.manual_seed(0)
    case = Case(
        raw=spread * torch.randn(n, vocab),
        target=torch.randint(vocab, (n,)),
        temperature=0.5 + torch.rand(n) if temperature else torch.ones(n),
        g=torch.randn(n),
        bias=torch.randn(vocab) if bias else None,
        softcap=softcap,
        h=torch.randn(n) if entropy else None,
        kind=kind,
    )
    if kind is not None:
        case.partner = torch.tensor([2, 4, 0, -1, 1, -1])
        case.own, case.cross = torch.randn(n), torch.randn(n)
        if kind == "jsd":  # its gradient through the mean vanishes when both rows weigh the same
            case.own = torch.where(case.partner > torch.arange(n), case.own, case.own[case.partner])
        case.own[case.partner < 0] = case.cross[case.partner < 0] = torch.nan  # never read
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.to(device))
    return case


def definition(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Statistics, and d/d(raw logits) of Σ g·logprob + h·H + own·KL(p ‖ partner's or mean) + cross·KL(partner's ‖ p)."""

    def cast(x):
        return x.to(dtype)

    raw = case.raw.detach().to(dtype).requires_grad_()
    z = raw if case.bias is None else raw + cast(case.bias)
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    z = z / cast(case.temperature)[:, None]
    lse = z.logsumexp(-1)
    log_p = z - lse[:, None]  # not log_softmax: a backend gets lse rounded, too
    logprob = log_p[torch.arange(len(z)), case.target]
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = (cast(case.g) * logprob).sum()
    if case.h is not None:
        loss = loss + (cast(case.h) * entropy).sum()
    found = {"logprob": logprob, "lse": lse, "entropy": entropy}
    if case.kind is not None:
        log_q = log_p[case.partner]
        # A row's gradient takes the partner as given, save for the mean of a Jensen–Shannon divergence
        log_r = log_q.detach() if case.kind == "kl" else torch.stack([log_p, log_q]).logsumexp(0) - math.log(2)
        paired = case.partner >= 0
        own = (log_p.exp() * (log_p - log_r)).sum(-1)
        cross = (log_q.detach().exp() * (log_q.detach() - log_p)).sum(-1)
        loss = loss + (cast(case.own)[paired] * own[paired] + cast(case.cross)[paired] * cross[paired]).sum()
        found["divergence"] = torch.where(paired, own, 0.0)
    loss.backward()
    return {name: value.detach() for name, value in found.items()} | {"dz": raw.grad}


def padded(x: torch.Tensor) -> torch.Tensor:
    """A copy with rows further apart than their length."""
    return torch.cat([x, x[:, :1].expand(-1, 16 - x.shape[1] % 16)], 1)[:, : x.shape[1]]


def run(rows: Backend, case: Case, dtype=torch.float32, source=None, in_place=False) -> dict[str, torch.Tensor]:
    """Results of the backend for a case, under the names of `definition`."""
    z, vocab = padded(case.raw), case.raw.shape[1]
    stats = RowStats(*rows.forward(z, case.target, case.bias, case.temperature, case.softcap))
    found = stats._asdict()
    pairing = None
    if case.kind is not None:
        found["divergence"] = rows.divergence(z, stats.lse, case.partner, case.kind)
        pairing = Pairing(case.kind, case.partner, found["divergence"], case.own, case.cross)
    if source is None:
        source = torch.arange(len(z), device=z.device)
    out = z.view(dtype)[:, :vocab] if in_place else padded(torch.full_like(case.raw, torch.nan, dtype=dtype))
    rows.backward(z, out, source, case.target, case.temperature, case.softcap, stats, case.g, case.h, pairing)
    return found | {"dz": out[: len(source)].clone()}


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Of vectors: the largest, relative to the largest value if that exceeds 1. Of gradients: the worst row's, relative
    to its norm unless that is far below |g| ~ 1, from which 1 − p is subtracted."""
    assert found.isfinite().all()
    difference = found.double() - exact
    if exact.ndim == 1:
        return float(difference.abs().max() / exact.abs().max().clamp(min=1.0))
    return float((difference.norm(dim=1) / exact.norm(dim=1).clamp(min=0.1)).max())


def check(rows: Backend, case: Case, **how: Any) -> None:
    found, exact, plain = run(rows, case, **how), definition(case, torch.float64), definition(case, torch.float32)
    factor = 4 if rows.interpreted and found["dz"].dtype == torch.bfloat16 else 2  # it cuts off where a GPU rounds
    factor *= 1 if VECTORISED else 8
    for name, value in exact.items():
        expected = plain[name].to(found[name].dtype)
        assert error(found[name], value) <= factor * error(expected, value) + 2 * EPS, name


@pytest.mark.parametrize("vocab", [1, 5, 1003, 4096, LONG])
def test_every_size_of_vocabulary(rows, vocab):
    check(rows, example(rows.device, vocab=vocab))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [False, True])
@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("bias", [False, True])
def test_every_option(rows, bias, softcap, temperature, entropy):
    check(rows, example(rows.device, bias=bias, softcap=softcap, temperature=temperature, entropy=entropy))


def test_all_options_over_some_tiles(rows):
    check(rows, example(rows.device, vocab=LONG, bias=True, softcap=7.0, temperature=True, entropy=True))


@pytest.mark.parametrize("vocab", [1003, LONG])
@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_pairs(rows, kind, options, vocab):
    softcap = 7.0 if options else None
    check(rows, example(rows.device, vocab=vocab, kind=kind, softcap=softcap, temperature=options, entropy=options))


@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_pairs_that_share_no_mass(rows, kind):
    case = example(rows.device, kind=kind)
    case.raw[:, :500] += 200.0 * (torch.arange(6, device=rows.device) % 3)[:, None]
    check(rows, case)


def test_one_row(rows):
    check(rows, example(rows.device, n=1))


def test_no_rows(rows):
    case = example(rows.device)
    found = run(rows, case, source=torch.arange(0, device=rows.device))
    assert found["dz"].shape == (0, 1003)
    assert rows.forward(case.raw[:0], case.target[:0], None, case.temperature[:0], None)[0].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_types(rows, dtype):
    if dtype.itemsize < 4 and not rows.small_types:
        pytest.skip("its GEMMs take fp32")
    check(rows, example(rows.device, entropy=True), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_over_the_logits(rows, dtype):
    """In place, with the active rows moved together, results equal those of a separate matrix bit by bit."""
    if dtype.itemsize < 4 and not rows.small_types:
        pytest.skip("its GEMMs take fp32")
    n, vocab = (1024, 151_936) if rows.device == "cuda" else (9, LONG)
    case = example(rows.device, n=n, vocab=vocab, temperature=True)
    case.g *= torch.rand(n, device=rows.device) < 0.5
    source = compaction_index(case.g != 0)
    assert (source != torch.arange(len(source), device=rows.device)).any()
    apart = run(rows, case, dtype=dtype)["dz"][source]
    assert torch.equal(run(rows, case, dtype=dtype, source=source, in_place=True)["dz"], apart)


@pytest.mark.parametrize("gap", [12.0, 60.0, 1000.0])
@pytest.mark.parametrize("likely", [False, True])
def test_one_dominant_logit(rows, gap, likely):
    """p → 1 and p → 0 at the target."""
    case = example(rows.device, spread=1.0, entropy=True)
    winner = case.target if likely else (case.target + 1) % 1003
    case.raw[torch.arange(6), winner] += gap
    check(rows, case)


def test_likely_target_keeps_its_digits(rows):
    """dL/dz at the target is g·(1 − p): all of its digits are in the log-prob, none in p."""
    case = example(rows.device)
    stats = rows.forward(case.raw, case.target, None, case.temperature, None)
    logprob = -torch.logspace(-12, 0, 6, device=rows.device)
    out = torch.empty_like(case.raw)
    source = torch.arange(6, device=rows.device)
    stats = RowStats(logprob, stats[1], stats[2])
    rows.backward(case.raw, out, source, case.target, case.temperature, None, stats, case.g, None)
    exact = case.g.double() * -logprob.double().expm1()
    assert ((out[source, case.target] - exact).abs() <= 4 * EPS * exact.abs()).all()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_huge_logits(rows, sign):
    case = example(rows.device, spread=3.0, entropy=True)
    case.raw += sign * 1e4
    check(rows, case)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_huge_differences(rows, shift):
    case = example(rows.device, vocab=LONG, entropy=True)
    case.raw[:, 4096:8192] += shift
    check(rows, case)


def test_equal_logits(rows):
    case = example(rows.device, vocab=LONG, spread=0.0, entropy=True)
    check(rows, case)


@pytest.mark.parametrize("kind", [None, "kl"])
def test_runs_are_identical(rows, kind):
    case = example(rows.device, vocab=LONG, softcap=7.0, temperature=True, entropy=True, kind=kind)
    first, second = run(rows, case), run(rows, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: 11 GB of logits in 70,000 rows")
def test_offsets_beyond_32_bits():
    rows = BACKENDS["triton"]
    n, vocab = 70_000, 40_001
    z = torch.randn(n, vocab, device="cuda")
    target, ones = torch.randint(vocab, (n,), device="cuda"), torch.ones(n, device="cuda")
    stats = rows.forward(z, target, None, ones, None)
    last = slice(n - 3, n)
    assert all(map(torch.equal, (s[last] for s in stats), rows.forward(z[last], target[last], None, ones[last], None)))
    source = torch.arange(3, device="cuda")
    alone = torch.empty_like(z[last])
    rows.backward(
        z[last], alone, source, target[last], ones[last], None, RowStats(*(s[last] for s in stats)), ones, None
    )
    rows.backward(z, z, torch.arange(n, device="cuda"), target, ones, None, stats, ones, None)
    assert torch.equal(z[last], alone)


@pytest.fixture
def ops():
    if (status := build.status()) != "ready":
        pytest.skip(status)
    return torch.ops.pact_fast


def test_indices_outside_are_refused_by_the_cpp_ops_before_anything_is_read(ops):
    z, ones = torch.zeros(3, 5), torch.ones(3)
    stats = [torch.full((3,), 7.0) for _ in range(3)]
    fine, source = torch.tensor([0, 4, 2]), torch.arange(3)
    for wrong in (-100, -1, 5):
        target = torch.tensor([0, wrong, 2])
        with pytest.raises(RuntimeError, match=rf"target\[1\] = {wrong} is outside \[0, 5\)"):
            ops.head_softmax_forward(z, target, None, ones, 0.0, *stats)
        with pytest.raises(RuntimeError, match=rf"target\[1\] = {wrong} is outside \[0, 5\)"):
            ops.head_softmax_backward(z, z, source, target, ones, 0.0, *stats, ones, *[None] * 5, False)
    assert all((t == 7.0).all() for t in stats) and (z == 0.0).all()
    for wrong in (-1, 3):
        with pytest.raises(RuntimeError, match=rf"source\[2\] = {wrong} is outside \[0, 3\)"):
            rows = torch.tensor([0, 1, wrong])
            ops.head_softmax_backward(z, z, rows, fine, ones, 0.0, *stats, ones, *[None] * 5, False)
    for wrong in (-2, 3):
        partner = torch.tensor([wrong, 2, 1])
        with pytest.raises(RuntimeError, match=rf"partner\[0\] = {wrong} is outside \[-1, 3\)"):
            ops.head_softmax_divergence(z, ones, partner, False, torch.empty(3))
        with pytest.raises(RuntimeError, match=rf"partner\[0\] = {wrong} is outside \[-1, 3\)"):
            pairs = partner, ones, ones, ones, False
            ops.head_softmax_backward(z, z.clone(), source, fine, ones, 0.0, *stats, ones, None, *pairs)


def test_tensors_that_do_not_fit_are_refused_by_the_cpp_ops(ops):
    z, ones, target = torch.zeros(3, 5), torch.ones(3), torch.zeros(3, dtype=torch.int64)
    for wrong in (torch.empty(2), torch.empty(3).double(), torch.empty(3, 2)[:, 0], torch.empty(3, 1)):
        for place, name in enumerate(("logprob", "lse", "entropy")):
            stats = [torch.empty(3) for _ in range(3)]
            stats[place] = wrong
            with pytest.raises(RuntimeError, match=rf"{name} must be contiguous fp32 \[3\]"):
                ops.head_softmax_forward(z, target, None, ones, 0.0, *stats)
            with pytest.raises(RuntimeError, match=rf"{name} must be contiguous fp32 \[3\]"):
                ops.head_softmax_backward(z, z, target, target, ones, 0.0, *stats, ones, *[None] * 5, False)
        with pytest.raises(RuntimeError, match=r"result must be contiguous fp32 \[3\]"):
            ops.head_softmax_divergence(z, ones, target, False, wrong)
    stats = [torch.empty(3) for _ in range(3)]
    for out in (torch.empty(2, 5), torch.empty(3, 4)):
        with pytest.raises(RuntimeError, match="out must have at least 3 rows of 5"):
            ops.head_softmax_backward(z, out, target, target, ones, 0.0, *stats, ones, *[None] * 5, False)
    for out in (torch.empty(3, 5).bfloat16(), torch.empty(5, 3).T):
        with pytest.raises(RuntimeError, match="out must be fp32"):
            ops.head_softmax_backward(z, out, target, target, ones, 0.0, *stats, ones, *[None] * 5, False)
    with pytest.raises(RuntimeError, match="given together"):
        ops.head_softmax_backward(
            z, z.clone(), target, target, ones, 0.0, *stats, ones, None, target, *[None] * 3, False
        )
