"""The fused bf16 softmax of the head (csrc/softmax_bf16.cpp) against softmax_torch.py in fp64.

Most cases use the identity as hidden states: the logits are then exactly the entries of W, and dW is dz, rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from pact_fast.kernels import linear_logprob
from pact_fast.kernels.head import softmax_torch
from pact_fast.kernels.head.chunked import ChunkedHead
from pact_fast.kernels.head.logits import Logits
from pact_fast.kernels.head.softmax_bf16 import PANEL, Bf16SoftmaxChunk
from pact_fast.kernels.head.softmax_torch import RowStats, compaction_index

EPS = torch.finfo(torch.float32).eps
UNIT = 2.0**-8  # largest relative error of rounding to bf16


@pytest.fixture(scope="module", autouse=True)
def ops(bf16_ops):
    return bf16_ops


class Case(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    temperature: torch.Tensor
    g: torch.Tensor


class Result(NamedTuple):
    stats: RowStats
    source: torch.Tensor
    dx: torch.Tensor
    dz: torch.Tensor  # of a case with the identity; else dWᵀ


def case(logits: torch.Tensor, x: torch.Tensor | None = None, per_row: bool = False) -> Case:
    """Rows [n, V] of logits; or, with x [n, D], a transposed weight [D, V]."""
    n, vocab = len(logits) if x is None else len(x), logits.shape[1]
    x = torch.eye(n) if x is None else x
    temperature = torch.rand(n) + 0.5 if per_row else torch.ones(n)
    return Case(x.bfloat16(), logits.T.bfloat16().contiguous(), torch.randint(vocab, (n,)), temperature, torch.randn(n))


def chunk(n: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    panels = -(-vocab // PANEL)
    return torch.full((panels, n, PANEL), torch.nan, dtype=torch.bfloat16), torch.full((panels, n), torch.nan)


def ours(c: Case, keep: bool = True) -> Result:
    ops, (n, width), vocab = torch.ops.pact_fast, c.x.shape, len(c.weight)
    stats = RowStats(*(torch.full((n,), torch.nan) for _ in range(3)))
    buffers = chunk(n, vocab)
    ops.bf16_softmax(c.x, c.weight, c.target, c.temperature, *(buffers if keep else (None, None)), *stats)
    source = compaction_index(c.g != 0)
    if not keep:
        return Result(stats, source, c.x[:0], c.x[:0])
    dx, hi = torch.full((len(source), width), torch.nan), torch.full_like(c.weight, torch.nan)
    lo = torch.full(c.weight.shape, 99, dtype=torch.int8)
    given = source, c.target, c.temperature, stats.logprob, stats.lse, c.g, c.x[source], c.weight
    ops.bf16_softmax_grads(*buffers, *given, dx, hi, lo, False)
    return Result(stats, source, dx, hi.T)


def exact(c: Case) -> Result:
    z, temperature, g = c.x.double() @ c.weight.double().T, c.temperature.double(), c.g.double()
    stats, source = softmax_torch.forward(z, c.target, None, temperature, None), compaction_index(c.g != 0)
    dz = torch.empty_like(z)
    softmax_torch.backward(z, dz, source, c.target, temperature, None, stats, g, None)
    dz = dz[: len(source)]
    return Result(stats, source, dz @ c.weight.double(), dz)


def check(c: Case) -> Result:
    """Statistics to fp32 precision and every entry of dz to that of two roundings to bf16, for a case with the identity."""
    found, truth = ours(c), exact(c)
    for name, value in truth.stats._asdict().items():
        off = (getattr(found.stats, name).double() - value).abs()
        assert (off <= 8 * EPS * value.abs().clamp(min=1.0)).all(), name
    dz, allowed = found.dz[found.source].double(), 2.02 * UNIT * truth.dz.abs() + 1e-30
    allowed[torch.arange(len(dz)), c.target[found.source]] += 4 * EPS * c.g[found.source].abs()  # from the log-prob
    assert ((dz - truth.dz).abs() <= allowed).all()
    assert (found.dx.double() - dz @ c.weight.double()).abs().max() <= 1e-5 * truth.dx.abs().max() + 1e-30
    return found


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("n, vocab", [(1, 1), (3, 5), (17, 64), (64, 1003), (70, 4099), (130, 833), (300, 65)])
def test_every_shape(n, vocab, per_row):
    torch.manual_seed(0)
    check(case(3.0 * torch.randn(n, vocab), per_row=per_row))


@pytest.mark.parametrize("n, width, vocab", [(5, 8, 5), (37, 101, 1003), (70, 2500, 700), (300, 896, 4099)])
def test_gemms_of_any_width(n, width, vocab):
    """Integers of which sums are exact, so that nothing but the softmax is rounded."""
    torch.manual_seed(0)
    c = case(torch.randint(-1, 2, (width, vocab)).float(), torch.randint(-1, 2, (n, width)).float())
    c = c._replace(temperature=torch.full((n,), 0.3 * width**0.5))
    found, truth = ours(c), exact(c)
    for name, value in truth.stats._asdict().items():
        assert (getattr(found.stats, name) - value).abs().max() <= 8 * EPS * value.abs().max().clamp(min=1.0), name
    dw = truth.dz.T @ c.x[truth.source].double()
    for mine, value in ((found.dx, truth.dx), (found.dz.T, dw)):
        assert (mine.double() - value).norm() <= UNIT * value.norm()


def test_rows_without_a_gradient_are_left_out():
    torch.manual_seed(0)
    c = case(3.0 * torch.randn(150, 1003), per_row=True)
    whole = ours(c)
    c = c._replace(g=c.g * (torch.rand(150) < 0.4))
    found = check(c)
    assert 0 < len(found.source) < 150 and (found.source != torch.arange(len(found.source))).any()
    assert torch.equal(found.dz[found.source], whole.dz[found.source])
    assert torch.equal(found.dx, whole.dx[found.source])


@pytest.mark.parametrize("gap", [12.0, 17.0, 60.0, 1000.0])
@pytest.mark.parametrize("likely", [False, True])
def test_one_dominant_logit(gap, likely):
    """p → 1 and p → 0 at the target: g·(1 − p) keeps its digits, which are all in the log-prob."""
    torch.manual_seed(0)
    logits = torch.randn(40, 1003)
    c = case(logits)
    winner = c.target if likely else (c.target + 500) % 1003
    logits[torch.arange(40), winner] += gap
    found = check(c._replace(weight=logits.T.bfloat16().contiguous()))
    at_target = found.dz[torch.arange(40), c.target].double()
    expected = -c.g.double() * found.stats.logprob.double().expm1()
    assert ((at_target - expected).abs() <= UNIT * expected.abs()).all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("columns", [slice(None), slice(128, 192), slice(100, 700), slice(0, 1)])
def test_huge_logits_and_huge_differences(columns, shift):
    torch.manual_seed(0)
    logits = torch.randn(33, 1003)
    logits[:, columns] += shift
    check(case(logits))


def test_equal_logits():
    torch.manual_seed(0)
    check(case(torch.zeros(20, 4099)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad):
    torch.manual_seed(0)
    logits = torch.randn(40, 1003)
    logits[7, 900] = bad
    c = case(logits)
    # 0·inf would be NaN in every row of a product with the identity: one row of W alone is not finite, and is read by x[7]
    c = c._replace(x=torch.eye(40)[:, :8].bfloat16(), weight=logits[:8].nan_to_num(0.0, 0.0).T.bfloat16().contiguous())
    c.x[7, 7] = bad
    found = ours(c)
    for value in (*found.stats, found.dx.sum(1)):
        assert (~value.isfinite()).nonzero().flatten().tolist() == [7]


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    c = case(0.2 * torch.randn(200, 3001), torch.randn(150, 200), per_row=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = ours(c)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            again = ours(c)
            assert all(map(torch.equal, (*again.stats, *again[1:]), (*first.stats, *first[1:])))
    finally:
        torch.set_num_threads(before)


def test_statistics_are_the_same_when_nothing_is_kept():
    torch.manual_seed(0)
    c = case(torch.randn(100, 1003), per_row=True)
    assert all(map(torch.equal, ours(c, keep=False).stats, ours(c).stats))


def test_a_weight_gradient_grows_from_chunk_to_chunk():
    torch.manual_seed(0)
    c = case(torch.randn(20, 90), torch.randn(60, 20))
    head = ChunkedHead("cpp", c.x, c.weight, None, None, 60, (False, True, False))
    parts = [slice(0, 32), slice(32, 60)]
    for part in parts:
        head.forward(c.x[part], c.target[part], c.temperature[part])
        assert head.backward(c.g[part])[1] is None
    d_weight = head.weight_grads()[0]
    expected = exact(c).dz.T @ c.x.double()
    assert d_weight is not None and (d_weight.double() - expected).norm() <= UNIT * expected.norm()


@pytest.mark.parametrize(
    "kept, options",
    [
        (Bf16SoftmaxChunk, {}),
        (Logits, {"softcap": 30.0}),
        (Logits, {"bias": True}),
        (Logits, {"paired": True}),
        (Logits, {"entropy_grad": True}),
        (Logits, {"backend": "torch"}),
        (Logits, {"dtype": torch.float32}),
    ],
)
def test_the_fused_softmax_is_used_where_it_suffices(kept, options):
    options = {"backend": "cpp", "bias": None, "softcap": None, **options}
    dtype, backend, softcap = options.pop("dtype", torch.bfloat16), options.pop("backend"), options.pop("softcap")
    bias = torch.zeros(50) if options.pop("bias") else None
    hidden, weight = torch.zeros(4, 8, dtype=dtype), torch.zeros(50, 8, dtype=dtype)
    head = ChunkedHead(backend, hidden, weight, bias, softcap, 4, (True, True, bias is not None), **options)
    assert type(head._chunk) is kept


@pytest.mark.parametrize("of_entropy", [0.0, 1.0])
def test_linear_logprob_with_and_without_an_entropy_gradient(of_entropy):
    torch.manual_seed(0)
    hidden, weight, target = (
        torch.randn(40, 16).bfloat16(),
        torch.randn(1003, 16).bfloat16(),
        torch.randint(1003, (40,)),
    )

    def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        logprob, entropy = linear_logprob(*inputs, target, entropy=True)
        loss = logprob.sum() + (of_entropy * entropy.sum() if of_entropy else 0.0)
        return torch.autograd.grad(loss, inputs)

    for mine, exact in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert (mine.double() - exact).norm() <= UNIT * exact.norm()


def test_no_rows(ops):
    c = case(torch.randn(8, 50), torch.empty(0, 8))
    assert ours(c).dx.shape == (0, 8)


def test_tensors_that_do_not_fit_are_refused(ops):
    c, (exp_z, panel_max) = case(torch.randn(3, 70)), chunk(3, 70)
    stats = [torch.empty(3) for _ in range(3)]
    for given in (
        (c.x.float(), c.weight, c.target, c.temperature, exp_z, panel_max),
        (c.x, c.weight, c.target.int(), c.temperature, exp_z, panel_max),
        (c.x, c.weight, c.target, c.temperature[:2], exp_z, panel_max),
        (c.x, c.weight, c.target, c.temperature, exp_z, None),
        (c.x, c.weight, c.target, c.temperature, exp_z[:1], panel_max),
        (c.x, c.weight, c.target, c.temperature, exp_z, panel_max.T),
    ):
        with pytest.raises(RuntimeError, match=r"must be contiguous|given together"):
            ops.bf16_softmax(*given, *stats)
    source, rows = torch.arange(3), (c.target, c.temperature, *stats[:2], c.g)
    dx = torch.empty(3, 3)
    for given in (
        (exp_z[:, :2], panel_max, source, *rows, c.x, c.weight, dx),
        (exp_z, panel_max, source[:2], *rows, c.x, c.weight, dx),
        (exp_z, panel_max, source, *rows, c.x, c.weight, dx[:2]),
    ):
        with pytest.raises(RuntimeError, match="must be contiguous"):
            ops.bf16_softmax_grads(*given, None, None, False)


@pytest.mark.parametrize("outside", [-100, -1, 70])
def test_indices_outside_are_refused_before_anything_is_read(ops, outside):
    c, (exp_z, panel_max) = case(torch.randn(3, 70)), chunk(3, 70)
    stats, wrong = [torch.zeros(3) for _ in range(3)], torch.tensor([0, outside, 1])
    with pytest.raises(RuntimeError, match=rf"target\[1\] = {outside} is outside \[0, 70\)"):
        ops.bf16_softmax(c.x, c.weight, wrong, c.temperature, exp_z, panel_max, *stats)
    assert all((t == 0).all() for t in stats)
    for source, target, named in ((wrong, c.target, "source"), (torch.arange(3), wrong, "target")):
        rows = source, target, c.temperature, *stats[:2], c.g
        with pytest.raises(RuntimeError, match=rf"{named}\[1\] = {outside} is outside"):
            ops.bf16_softmax_grads(exp_z, panel_max, *rows, c.x, c.weight, torch.empty(3, 3), None, None, False)


def test_outputs_that_do_not_fit_are_refused(ops):
    c, (exp_z, panel_max) = case(torch.randn(3, 70)), chunk(3, 70)
    given = c.x, c.weight, c.target, c.temperature, exp_z, panel_max
    for name in ("logprob", "lse", "entropy"):
        for wrong in (torch.empty(2), torch.empty(3).double(), torch.empty(3, 2)[:, 0]):
            stats = {"logprob": torch.empty(3), "lse": torch.empty(3), "entropy": torch.empty(3), name: wrong}
            with pytest.raises(RuntimeError, match=rf"{name} must be contiguous fp32 \[3\]"):
                ops.bf16_softmax(*given, *stats.values())
