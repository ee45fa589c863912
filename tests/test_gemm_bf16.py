"""The bf16 products with fp32 results (csrc/gemm_bf16.cpp): exact on integers, at every odd shape; fp32 sums; threads."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def ops(bf16_ops):
    return bf16_ops


def integers(*shape: int) -> torch.Tensor:
    """Small enough for sums of thousands of products to be exact in fp32 in any order."""
    return torch.randint(-8, 9, shape).float()


class Sums(tuple):
    """(hi, lo): a matrix in the 24 bits of the weight gradient."""

    def __new__(cls, values: torch.Tensor):
        hi = values.bfloat16()
        return super().__new__(cls, (hi, torch.zeros(values.shape, dtype=torch.int8)))

    def value(self) -> torch.Tensor:
        hi, lo = (t.int() for t in (self[0].view(torch.int16), self[1]))
        return (((hi << 8) + lo) << 8).view(torch.float32).double()

    def is_rounded(self, exact: torch.Tensor) -> bool:
        """Nearest in 24 bits, the first part alone nearest in bf16 (ties may go either way)."""
        close = (self.value() - exact).abs() <= 2.0**-16 * exact.abs()
        nearest = (self[0].double() - exact).abs() <= (2.0**-8 + 2.0**-16) * exact.abs()
        return bool(close.all() and nearest.all())


def with_gap(t: torch.Tensor, gap: int = 3) -> torch.Tensor:
    """t as part of a wider matrix: its row stride is larger than its rows, and NaN lies between them."""
    return torch.full((t.shape[0], t.shape[1] + gap), torch.nan)[:, : t.shape[1]].copy_(t)


SMALL = [(n, width, vocab) for n in (1, 3, 17) for width in (1, 8, 64, 101, 896) for vocab in (5, 1003, 4099)]
# beyond a block in each direction: rows (1024), depth (2048), blocks of dz (1024), and exactly as large
LARGE = [(1100, 100, 70), (1024, 64, 1024), (33, 2051, 65), (2, 4099, 3), (95, 130, 2050)]


@pytest.mark.parametrize("n, width, vocab", SMALL + LARGE)
def test_products_of_integers_are_exact(n, width, vocab, ops):
    torch.manual_seed(0)
    x, weight, dz = integers(n, width).bfloat16(), integers(vocab, width).bfloat16(), with_gap(integers(n, vocab))
    z, dx = with_gap(torch.full((n, vocab), torch.nan)), torch.full((n, width), torch.nan)
    d_weight = Sums(integers(vocab, width))
    grown = d_weight.value() + dz.double().T @ x.double()

    ops.bf16_logits(x, weight, z)
    assert torch.equal(z.double(), x.double() @ weight.double().T)
    assert z.as_strided((n - 1, 3), z.stride(), vocab).isnan().all()  # between the rows

    ops.bf16_grads(dz, x, weight, dx, *d_weight, True)
    assert torch.equal(dx.double(), dz.double() @ weight.double())
    assert d_weight.is_rounded(grown)

    alone, new = torch.full_like(dx, torch.nan), Sums(torch.full((vocab, width), torch.nan))
    ops.bf16_grads(dz, x, weight, alone, None, None, True)
    ops.bf16_grads(dz, x, weight, None, *new, False)
    assert torch.equal(alone, dx) and new.is_rounded(dz.double().T @ x.double())


@pytest.mark.parametrize("n, width, vocab", [(17, 896, 4099), (300, 2500, 1003), (1100, 101, 77)])
def test_sums_are_fp32_and_only_dz_is_rounded(n, width, vocab, ops):
    torch.manual_seed(0)
    x, weight = torch.randn(n, width).bfloat16(), torch.randn(vocab, width).bfloat16()
    dz = torch.randn(n, vocab) * torch.logspace(-8, 0, vocab)
    z, dx, d_weight = torch.empty(n, vocab), torch.empty(n, width), Sums(torch.zeros(vocab, width))
    ops.bf16_logits(x, weight, z)
    ops.bf16_grads(dz, x, weight, dx, *d_weight, False)
    rounded = dz.bfloat16().double()
    for mine, a, b in ((z, x, weight.T), (dx, rounded, weight)):
        a, b = a.double(), b.double()
        # per element, against the terms that were added; bf16 results would be off by 2e-3 of the largest
        assert ((mine - a @ b).abs() <= 1e-6 * (a.abs() @ b.abs())).all()
        assert (mine - a @ b).norm() <= 1e-6 * (a @ b).norm()
    exact, terms = rounded.T @ x.double(), rounded.T.abs() @ x.double().abs()
    assert ((d_weight.value() - exact).abs() <= 2.0**-16 * exact.abs() + 1e-6 * terms).all()


def test_a_gradient_that_grows_over_many_calls_keeps_its_digits(ops):
    """bf16 alone would lose everything below 1/256 of the sum so far; fp32 is the reference."""
    torch.manual_seed(0)
    x, weight = torch.randn(16, 64).bfloat16(), torch.randn(100, 64).bfloat16()
    d_weight, exact = Sums(torch.zeros(100, 64)), torch.zeros(100, 64, dtype=torch.float64)
    for step in range(200):
        dz = (torch.randn(16, 100) + 1.0).bfloat16().float()
        ops.bf16_grads(dz, x, weight, None, *d_weight, step > 0)
        exact += dz.double().T @ x.double()
    assert (d_weight.value() - exact).norm() <= 1e-4 * exact.norm()
    assert (d_weight[0].double() - exact).norm() <= 1.1 * (exact.bfloat16().double() - exact).norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_stay_in_their_row_and_column(bad, ops):
    x, weight = torch.ones(40, 8).bfloat16(), torch.ones(50, 8).bfloat16()
    dz, dx, d_weight = torch.ones(40, 50), torch.empty(40, 8), Sums(torch.zeros(50, 8))
    dz[35, 43] = bad
    for _ in range(2):  # also when it is there already
        ops.bf16_grads(dz, x, weight, dx, *d_weight, True)
    assert (~dx.isfinite()).nonzero()[:, 0].unique().tolist() == [35]
    assert (~d_weight[0].isfinite()).nonzero()[:, 0].unique().tolist() == [43]


@pytest.mark.parametrize("n, width, vocab", [(513, 64, 1500), (1100, 200, 1003), (70, 896, 333)])
def test_results_do_not_depend_on_the_number_of_threads(n, width, vocab, ops):
    torch.manual_seed(0)
    x, weight, dz = torch.randn(n, width).bfloat16(), torch.randn(vocab, width).bfloat16(), torch.randn(n, vocab)

    def results(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        out = [torch.empty(n, vocab), torch.empty(n, width), *Sums(torch.zeros(vocab, width))]
        ops.bf16_logits(x, weight, out[0])
        ops.bf16_grads(dz, x, weight, *out[1:], True)
        return out

    before = torch.get_num_threads()
    try:
        first = results(1)
        for threads in (2, 3, 8):
            assert all(map(torch.equal, results(threads), first))
    finally:
        torch.set_num_threads(before)


def test_no_rows(ops):
    x, weight, d_weight = torch.empty(0, 8).bfloat16(), torch.ones(5, 8).bfloat16(), Sums(torch.ones(5, 8))
    ops.bf16_logits(x, weight, torch.empty(0, 5))
    ops.bf16_grads(torch.empty(0, 5), x, weight, torch.empty(0, 8), *d_weight, True)
    assert (d_weight.value() == 1).all()


def test_tensors_that_do_not_fit_are_refused(ops):
    x, weight, z = torch.ones(3, 8).bfloat16(), torch.ones(5, 8).bfloat16(), torch.empty(3, 5)
    dx, (hi, lo) = torch.empty(3, 8), Sums(torch.zeros(5, 8))
    for arguments in ((x.float(), weight, z), (x, weight[:, :7], z), (x, weight, z[:2]), (x, weight, z.bfloat16()),
                      (x, weight.T.contiguous().T, z), (x, weight, torch.empty(5, 3).T)):  # fmt: skip
        with pytest.raises(
            RuntimeError, match=r"x must be contiguous bf16|weight must be contiguous bf16|z must be fp32"
        ):
            ops.bf16_logits(*arguments)
    for arguments in (
        (z, x, weight, dx.T, None, None),
        (z, x, weight, None, hi[:4], lo[:4]),
        (z, x, weight, None, hi, None),
        (z, x, weight, None, hi.float(), lo),
        (z.double(), x, weight, dx, None, None),
    ):
        with pytest.raises(RuntimeError, match=r"d[xz] must be|d_weight must be|d_weight and lo"):
            ops.bf16_grads(*arguments, True)


def test_without_onednn_the_operators_say_that_they_are_not_ready(ops):
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        assert not ops.bf16_gemm_ready()
        with pytest.raises(RuntimeError, match="no bf16 GEMMs"):
            ops.bf16_logits(torch.ones(3, 8).bfloat16(), torch.ones(5, 8).bfloat16(), torch.empty(3, 5))
    finally:
        torch._C._set_mkldnn_enabled(enabled)
