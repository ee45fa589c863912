"""The fp32 products (csrc/gemm_fp32.cpp): exact on integers, at every odd shape; as precise as torch's; threads."""

from __future__ import annotations

import pytest
import torch

from pact_fast.kernels.runtime import build


@pytest.fixture(scope="module", autouse=True)
def ops():
    if (status := build.status()) != "ready":
        pytest.skip(f"no C++ library: {status}")
    if not torch.ops.pact_fast.fp32_gemm_ready():
        pytest.skip("no fp32 products: no AVX-512")
    return torch.ops.pact_fast


def integers(*shape: int) -> torch.Tensor:
    """Small enough for sums of thousands of products to be exact in fp32 in any order."""
    return torch.randint(-8, 9, shape).float()


def with_gap(t: torch.Tensor, gap: int = 3) -> torch.Tensor:
    """t as part of a wider matrix: its row stride is larger than its rows, and NaN lies between them."""
    return torch.full((t.shape[0], t.shape[1] + gap), torch.nan)[:, : t.shape[1]].copy_(t)


SMALL = [(n, width, vocab) for n in (1, 3, 17) for width in (1, 8, 64, 101, 896) for vocab in (5, 1003, 4099)]
# beyond a block in each direction: rows (1024), depth (1024), blocks of dz (768), and exactly as large
LARGE = [(1100, 100, 70), (1024, 64, 768), (33, 1027, 65), (2, 2051, 3), (95, 130, 1538)]


@pytest.mark.parametrize("n, width, vocab", SMALL + LARGE)
def test_products_of_integers_are_exact(n, width, vocab, ops):
    torch.manual_seed(0)
    x, weight, dz = integers(n, width), integers(vocab, width), with_gap(integers(n, vocab))
    z, dx = with_gap(torch.full((n, vocab), torch.nan)), torch.full((n, width), torch.nan)
    before = integers(vocab, width)
    d_weight = before.clone()

    ops.fp32_logits(x, weight, z)
    assert torch.equal(z.double(), x.double() @ weight.double().T)
    assert z.as_strided((n - 1, 3), z.stride(), vocab).isnan().all()  # between the rows

    ops.fp32_grads(dz, x, weight, dx, d_weight, True)
    assert torch.equal(dx.double(), dz.double() @ weight.double())
    assert torch.equal(d_weight.double(), before.double() + dz.double().T @ x.double())

    alone, new = torch.full_like(dx, torch.nan), torch.full_like(d_weight, torch.nan)
    ops.fp32_grads(dz, x, weight, alone, None, True)
    ops.fp32_grads(dz, x, weight, None, new, False)
    assert torch.equal(alone, dx)
    assert torch.equal(new.double(), dz.double().T @ x.double())


def off(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a - exact).norm() / exact.norm())


LONG = pytest.param(1100, 101, 20_000, marks=pytest.mark.slow)


@pytest.mark.parametrize("n, width, vocab", [(17, 896, 4099), (300, 2500, 1003), LONG])
def test_sums_are_as_precise_as_those_of_torch(n, width, vocab, ops):
    torch.manual_seed(0)
    x, weight, dz = torch.randn(n, width), torch.randn(vocab, width), torch.randn(n, vocab)
    z, dx, d_weight = torch.empty(n, vocab), torch.empty(n, width), torch.empty(vocab, width)
    ops.fp32_logits(x, weight, z)
    ops.fp32_grads(dz, x, weight, dx, d_weight, False)
    for ours, a, b in ((z, x, weight.T), (dx, dz, weight), (d_weight, dz.T, x)):
        exact = a.double() @ b.double()
        assert off(ours, exact) < 2 * off(a @ b, exact)


def test_results_do_not_depend_on_the_threads(ops):
    torch.manual_seed(0)
    x, weight, dz = torch.randn(300, 200), torch.randn(2003, 200), torch.randn(300, 2003)

    def run() -> list[torch.Tensor]:
        z, dx, d_weight = torch.empty(300, 2003), torch.empty(300, 200), torch.empty(2003, 200)
        ops.fp32_logits(x, weight, z)
        ops.fp32_grads(dz, x, weight, dx, d_weight, False)
        return [z, dx, d_weight]

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused(ops):
    x, weight, z = torch.zeros(2, 8), torch.zeros(5, 8), torch.zeros(2, 5)
    with pytest.raises(RuntimeError, match="weight must be contiguous fp32"):
        ops.fp32_logits(x, weight[:, :4], z)
    with pytest.raises(RuntimeError, match="z must be fp32"):
        ops.fp32_logits(x, weight, torch.zeros(2, 6))
    with pytest.raises(RuntimeError, match="z must be fp32"):
        ops.fp32_logits(x, weight, torch.zeros(2, 5).bfloat16())
    with pytest.raises(RuntimeError, match="dz must be fp32"):
        ops.fp32_grads(z.T.contiguous().T, x, weight, None, None, False)
    with pytest.raises(RuntimeError, match="not empty"):
        ops.fp32_logits(x[:, :0], weight[:, :0], z)
    with pytest.raises(RuntimeError, match="dx"):
        ops.fp32_grads(z, x, weight, torch.zeros(2, 7), None, False)
    with pytest.raises(RuntimeError, match="d_weight"):
        ops.fp32_grads(z, x, weight, None, torch.zeros(5, 7), False)
