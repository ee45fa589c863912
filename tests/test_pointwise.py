"""Pointwise steps in one pass on CPU (csrc/pointwise.cpp): errors against fp64, sizes, layouts, threads, limits."""

from __future__ import annotations

import pytest
import torch

from pact_fast.kernels.decoder.pointwise import RmsNorm, Rotary, SiluMul, serves
from pact_fast.kernels.runtime import build

EPS = 1e-6
SHAPES = [(1, 1), (3, 7), (33, 64), (130, 80), (1, 4096), (64 * 33 + 1, 16), (2, 3, 5, 32)]


@pytest.fixture(autouse=True)
def kernel():
    if (status := build.status()) != "ready":
        pytest.skip(f"no C++ library: {status}")


def norm_chain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As models write it; in fp64 if x is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def gated_chain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return RmsNorm.apply(x, weight, EPS)


CASES = {"norm": (norm, norm_chain), "gated": (SiluMul.apply, gated_chain)}


def inputs(name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    other = shape[-1:] if name == "norm" else shape
    return [(scale * torch.randn(shape)).to(dtype), torch.randn(other).to(dtype)]


def results(function, tensors, upstream) -> list[torch.Tensor]:
    """The result, and the gradients of all inputs."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_errors_are_at_most_twice_those_of_the_chain(name, dtype, shape, scale):
    ours, chain = CASES[name]
    tensors = inputs(name, shape, dtype, scale)
    upstream = torch.randn(shape, dtype=torch.float64).to(dtype)
    exact = results(chain, [t.double() for t in tensors], upstream)
    for mine, other, truth in zip(
        results(ours, tensors, upstream), results(chain, tensors, upstream), exact, strict=True
    ):
        unit = torch.finfo(dtype).eps / 2 * truth.norm()
        assert mine.dtype == dtype and mine.shape == truth.shape
        assert (mine.double() - truth).norm() <= 2 * (other.double() - truth).norm() + unit


def test_a_sum_over_many_rows_keeps_its_digits():
    """With one accumulator for all rows, the error of this dL/dweight is eight times as large."""
    rows, ones = 1 << 18, torch.ones(16)
    x, upstream = torch.ones(rows, 16), torch.full((rows, 16), 0.1)
    _, _, d_weight = results(norm, [x, ones], upstream)
    _, _, exact = results(norm_chain, [x.double(), ones.double()], upstream)
    assert ((d_weight.double() - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundings_forward_are_those_of_the_chain(dtype):
    """A bf16 result differs only where the sum of squares, added in another order, makes 1/rms another number."""
    for name, (ours, chain) in CASES.items():
        tensors = inputs(name, (256, 128), dtype)
        mine, theirs = ours(*tensors), chain(*tensors)
        limit = 1e-3 if dtype == torch.bfloat16 else 1.0
        assert (mine != theirs).float().mean() <= limit
        torch.testing.assert_close(mine, theirs, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(name, dtype):
    tensors = inputs(name, (3001, 48), dtype)
    upstream = torch.randn(3001, 48).to(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(CASES[name][0], tensors, upstream))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_extreme_values_give_what_the_chain_gives():
    gate = torch.tensor([-1e30, -200.0, -88.5, -87.0, -0.0, 0.0, 88.5, 200.0, 1e30, torch.inf, torch.nan])
    one = torch.ones_like(gate)
    mine, theirs = results(SiluMul.apply, [gate, one], one), results(gated_chain, [gate, one], one)
    torch.testing.assert_close(mine[0], theirs[0], atol=1e-30, rtol=1e-6, equal_nan=True)
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a[:-2], b[:-2], atol=1e-30, rtol=1e-6)
        assert a[-1].isnan()


def rotary_chain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def rows_outermost(heads: int, rows: int, width: int) -> torch.Tensor:
    return torch.randn(1, rows, heads, width).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, rows, width", [(1, 1, 2), (4, 33, 16), (3, 300, 80), (64, 5, 256)])
def test_rotary_has_the_roundings_of_the_chain(dtype, heads, rows, width):
    """Angles that differ in both halves, as in no model: formulas that mix them up must show."""
    torch.manual_seed(0)
    x, upstream = (rows_outermost(heads, rows, width).to(dtype) for _ in range(2))
    cos, sin = (torch.randn(1, rows, width).to(dtype) for _ in range(2))

    def both(function) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        out = function(leaf, cos, sin)
        return [out.detach(), *torch.autograd.grad(out, leaf, upstream)]

    mine, theirs = both(Rotary.apply), both(rotary_chain)
    for a, b in zip(mine, theirs, strict=True):
        limit = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}  # of fused sums
        torch.testing.assert_close(a, b, **limit)
    assert mine[0].stride() == x.stride()


def test_rotary_takes_part_of_a_head_and_any_layout():
    x = torch.randn(1, 7, 3, 20).transpose(1, 2)[..., 4:12]
    cos, sin = torch.randn(2, 1, 7, 8)
    for part in (x, x.contiguous(), torch.randn(1, 3, 8, 7).mT):
        torch.testing.assert_close(Rotary.apply(part, cos, sin), rotary_chain(part, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_zeros_and_one_with_nan(dtype):
    x = torch.randn(4, 16).to(dtype)
    x[1] = 0.0
    x.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[2, 3] = -1  # NaN, all of its bits set
    weight = torch.ones(16, dtype=dtype)
    out, dx, _ = results(norm, [x, weight], torch.ones_like(x))
    for found in (out, dx):
        assert found[[0, 1, 3]].isfinite().all() and found[2].isnan().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_any_layout_and_no_rows(name):
    ours, chain = CASES[name]
    wide = torch.randn(6, 4, 32)
    tensors = [wide.transpose(0, 1), torch.randn(32) if name == "norm" else torch.randn(8, 6, 32)[::2]]
    upstream = torch.randn(6, 4, 32).transpose(0, 1)
    for a, b in zip(results(ours, tensors, upstream), results(chain, tensors, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    empty = [torch.empty(0, 32), torch.ones(32) if name == "norm" else torch.empty(0, 32)]
    out, dx, other = results(ours, empty, torch.empty(0, 32))
    assert out.shape == dx.shape == (0, 32) and (other == 0).all()


def test_a_weight_that_does_not_train_has_no_gradient():
    x, weight = torch.randn(5, 16, requires_grad=True), torch.randn(16)
    norm(x, weight).sum().backward()
    other = x.detach().requires_grad_()
    norm_chain(other, weight).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert weight.grad is None


def test_inputs_that_the_kernels_do_not_support():
    a = torch.randn(4)
    assert serves(a, a) and serves(a.bfloat16())
    assert not serves(a.double()) and not serves(a.half()) and not serves(a, a.bfloat16())
    assert not serves(torch.empty(4, device="meta"))


def test_operators_refuse_what_does_not_fit():
    ops, x, weight = torch.ops.pact_fast, torch.randn(3, 8), torch.ones(8)
    with pytest.raises(RuntimeError, match="out must be contiguous, of the right size and of one dtype"):
        ops.rms_norm(x, weight, EPS, torch.empty(3, 8).bfloat16())
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        ops.rms_norm(x.t(), torch.ones(3), EPS, torch.empty(8, 3))
    with pytest.raises(RuntimeError, match="d_weight must be"):
        ops.rms_norm_backward(x, x, weight, EPS, torch.empty_like(x), torch.empty(7))
    with pytest.raises(RuntimeError, match="up must be"):
        ops.silu_mul(x, weight, torch.empty_like(x))
    with pytest.raises(RuntimeError, match="cos must be"):
        ops.rotary(torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4), torch.randn(1, 3, 8), False, torch.empty(1, 2, 3, 8))
    with pytest.raises(RuntimeError, match="x and out must be"):
        ops.rotary(torch.randn(1, 2, 3, 7), torch.randn(1, 3, 7), torch.randn(1, 3, 7), False, torch.empty(1, 2, 3, 7))
    with pytest.raises(RuntimeError, match="fp32 or bf16"):
        ops.silu_mul(x.half(), x.half(), torch.empty_like(x).half())


def test_tensors_without_elements_are_served():
    ops = torch.ops.pact_fast
    none = torch.empty(3, 0)
    ops.rms_norm(none, torch.empty(0), EPS, torch.empty(3, 0))
    ops.rms_norm_backward(none, none, torch.empty(0), EPS, torch.empty(3, 0), torch.empty(0))
    ops.rotary(torch.empty(1, 0, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8), False, torch.empty(1, 0, 3, 8))
    ops.rotary(torch.empty(1, 2, 3, 0), torch.empty(1, 3, 0), torch.empty(1, 3, 0), False, torch.empty(1, 2, 3, 0))


def test_outputs_that_do_not_fit_are_refused():
    ops, x, weight = torch.ops.pact_fast, torch.randn(3, 8), torch.ones(8)
    fine = torch.empty(3, 8)
    for wrong in (torch.empty(2, 8), fine.double(), fine.bfloat16(), torch.empty(8, 3).T):
        with pytest.raises(RuntimeError, match="out must be"):
            ops.rms_norm(x, weight, EPS, wrong)
        with pytest.raises(RuntimeError, match="dx must be"):
            ops.rms_norm_backward(x, x, weight, EPS, wrong, None)
        with pytest.raises(RuntimeError, match="out must be"):
            ops.silu_mul(x, x, wrong)
        for place, name in enumerate(("d_gate", "d_up", "out")):
            outputs = [fine, fine, fine]
            outputs[place] = wrong
            with pytest.raises(RuntimeError, match=f"{name} must be"):
                ops.silu_mul_backward(x, x, x, *outputs)
    heads, angles = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8)
    for wrong in (heads[:, :1], heads[:, :, :2], heads.bfloat16(), torch.empty(1, 2, 8, 3).mT):
        with pytest.raises(RuntimeError, match="out must"):
            ops.rotary(heads, angles, angles, False, wrong)
