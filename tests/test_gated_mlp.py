"""The gated MLP as one step of autograd: errors against fp64, gradients, saved tensors, and supported modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import profile

from pact_fast.kernels.decoder.gated_mlp import gated_mlp
from pact_fast.kernels.decoder.pointwise import RmsNorm, SiluMul, silu_mul, silu_mul_backward
from pact_fast.kernels.runtime import build
from pact_fast.model.patch import fused_kernels
from pact_fast.model.rematerialize import Rematerialize
from tests.support.memory import peak_bytes

STEP = "_GatedMlp"  # of autograd


@pytest.fixture(autouse=True)
def kernel():
    if (status := build.status()) != "ready":
        pytest.skip(f"no C++ library: {status}")


def chain(x, gate, up, down):
    return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def inputs(shape: tuple[int, ...], hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    width = shape[-1]
    matrices = [torch.randn(hidden, width) / width**0.5 for _ in range(2)] + [torch.randn(width, hidden) / hidden**0.5]
    return [t.to(dtype).requires_grad_() for t in (torch.randn(shape), *matrices)]


def results(function, tensors, upstream) -> list[torch.Tensor]:
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, [t for t in tensors if t.requires_grad], upstream.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, hidden", [((1, 1), 1), ((3, 8), 24), ((1, 257, 64), 96), ((2, 5, 3, 32), 80)])
def test_errors_are_at_most_twice_those_of_the_chain(shape, hidden, dtype):
    tensors = inputs(shape, hidden, dtype)
    upstream = torch.randn(shape, dtype=torch.float64).to(dtype)
    exact = results(chain, [t.detach().double().requires_grad_() for t in tensors], upstream)
    for mine, other, truth in zip(
        results(gated_mlp, tensors, upstream), results(chain, tensors, upstream), exact, strict=True
    ):
        unit = torch.finfo(dtype).eps / 2 * truth.norm()
        assert mine.dtype == dtype and mine.shape == truth.shape
        assert (mine.double() - truth).norm() <= 2 * (other.double() - truth).norm() + unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_backward_gives_the_gradients_and_the_bits_of_the_product(dtype):
    torch.manual_seed(0)
    gate, up = (torch.randn(300, 65).to(dtype).requires_grad_() for _ in range(2))
    upstream = torch.randn(300, 65).to(dtype)
    expected = torch.autograd.grad(SiluMul.apply(gate, up), (gate, up), upstream)
    *gradients, product = silu_mul_backward(upstream.clone(), gate.detach(), up.detach())
    assert torch.equal(product, silu_mul(gate.detach(), up.detach()))
    torch.testing.assert_close(gradients, list(expected))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_gradients_that_are_needed_are_computed(wanted):
    tensors = inputs((9, 16), 24, torch.float32)
    for i, t in enumerate(tensors):
        t.requires_grad_(i in wanted)
    upstream = torch.randn(9, 16)
    for mine, truth in zip(results(gated_mlp, tensors, upstream), results(chain, tensors, upstream), strict=True):
        torch.testing.assert_close(mine, truth)


def test_upstream_gradients_of_any_layout_stay_as_they_are():
    tensors = inputs((1, 6, 16), 24, torch.float32)
    for upstream in (torch.randn(1, 16, 6).mT, torch.ones(1).expand(1, 6, 16)):
        before = upstream.clone()
        for mine, truth in zip(results(gated_mlp, tensors, upstream), results(chain, tensors, upstream), strict=True):
            torch.testing.assert_close(mine, truth)
        assert torch.equal(upstream, before)


def test_a_second_pass_through_a_kept_graph_gives_the_same_bits():
    tensors = inputs((5, 16), 24, torch.bfloat16)
    total = gated_mlp(*tensors).float().pow(2).sum()
    first, second = (torch.autograd.grad(total, tensors, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_an_input_that_one_pass_made_is_not_held():
    """Twelve norms and MLPs in a row hold each a residual and two products, and no result of a norm."""
    x, *weights = inputs((1, 512, 64), 96, torch.float32)
    scale = torch.ones(64, requires_grad=True)

    def forward():
        y = x
        for _ in range(12):
            y = y + gated_mlp(RmsNorm.apply(y, scale, 1e-6), *weights)
        return y

    ours = peak_bytes(lambda: _inside(Rematerialize(), forward).sum().backward())
    assert ours < peak_bytes(lambda: forward().sum().backward()) - 8 * x.nbytes


def _inside(context, function):
    with context:
        return function()


class Gated(nn.Module):
    def __init__(self, bias: bool = False):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=bias) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def runs_in_one_step(model: nn.Module, x: torch.Tensor) -> bool:
    expected = model(x)
    with fused_kernels(nn.ModuleList([model])), profile() as profiler:
        out = model(x)
    torch.testing.assert_close(out, expected)
    return STEP in {event.key for event in profiler.key_averages()}


def test_plain_products_run_in_one_step():
    assert runs_in_one_step(Gated(), torch.randn(2, 3, 8))


class Adapter(nn.Linear):
    """As peft's: a product by its class, and more than that."""

    def forward(self, x):
        return super().forward(x) + x


def another_forward(product: nn.Linear) -> None:
    product.forward = lambda x: 2.0 * x


CHANGES = {
    "hook before": lambda product: product.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,)),
    "hook behind": lambda product: product.register_forward_hook(lambda module, args, out: out + 1.0),
    "backward hook": lambda product: product.register_full_backward_hook(lambda module, grads, grad: None),
    "backward hook before": lambda product: product.register_full_backward_pre_hook(lambda module, grad: None),
    "forward of its own": another_forward,
    "parametrized": lambda product: nn.utils.parametrizations.weight_norm(product),
}


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_products_are_called_as_they_are(name, change):
    model = Gated()
    CHANGES[change](getattr(model, name))
    assert not runs_in_one_step(model, torch.randn(2, 3, 8))


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_adapters_and_other_dtypes_are_called_as_they_are(name):
    model = Gated()
    setattr(model, name, Adapter(8, 8, bias=False))
    assert not runs_in_one_step(model, torch.randn(2, 3, 8))
    assert not runs_in_one_step(Gated(bias=True), torch.randn(2, 3, 8))
    assert not runs_in_one_step(Gated().double(), torch.randn(2, 3, 8).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_in_one_step(Gated(), torch.randn(2, 3, 8))


def test_hooks_on_all_modules_are_called():
    model, x, seen = Gated(), torch.randn(2, 3, 8), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        assert not runs_in_one_step(model, x)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6
