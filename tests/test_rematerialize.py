"""Rematerialization: activations recomputed in the backward pass have the same bits and need less memory."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import handle_torch_function, has_torch_function

from pact_fast.model import forward, rematerialize
from pact_fast.model.build import enable_gradient_checkpointing
from pact_fast.model.rematerialize import Rematerialize
from tests.support.memory import decoder_step, peak_bytes
from tests.support.models import KINDS, make
from tests.support.trees import as_tree, trees


def parameter_gradients(model, total: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    total.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture
def keep_all(monkeypatch):
    """Switch it off."""
    return lambda: monkeypatch.setattr(forward, "Rematerialize", nullcontext)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_bits(kind, dtype, keep_all):
    model = make(kind).to(dtype)
    ours = parameter_gradients(model, as_tree(model, trees()))
    keep_all()
    for a, b in zip(ours, parameter_gradients(model, as_tree(model, trees())), strict=True):
        assert torch.equal(a, b)


def test_autocast_and_checkpointing_give_the_same_bits(keep_all):
    model = make("qwen3").float().train()

    def both() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            total = as_tree(model, trees())
        found = parameter_gradients(model, total)
        enable_gradient_checkpointing(model)
        found += parameter_gradients(model, as_tree(model, trees()))
        model.gradient_checkpointing_disable()
        return found

    ours = both()
    keep_all()
    for a, b in zip(ours, both(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_forward_pass_without_a_backward_pass_leaves_nothing(kind):
    model = make(kind).float()
    weights = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        as_tree(model, trees())
    del model
    gc.collect()
    assert not any(weight() for weight in weights)


@pytest.fixture
def step():
    return decoder_step(torch.float32)


def test_a_gated_decoder_holds_half_as_much(step, monkeypatch):
    """Of a Qwen3 layer's activations the products and silu(gate) are not kept, nor what leads to them."""
    ours = peak_bytes(step)
    monkeypatch.setattr(forward, "is_compiled", lambda model: True)
    assert ours < 0.65 * peak_bytes(step)


def test_results_of_steps_in_one_pass_are_not_kept(step, keep_all):
    """Of norms: a gated MLP of plain products keeps no result of its own either way."""
    ours = peak_bytes(step)
    keep_all()
    assert ours < 0.95 * peak_bytes(step)


def upper_half(t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """One operation to a function mode, which saves a part of its input that begins where the input does."""
    if has_torch_function((t, w)):
        return handle_torch_function(upper_half, (t, w), t, w)
    return t[:2] * w


def test_views_slices_and_shared_results_are_told_apart():
    """A saved tensor is recomputed only if it is the whole result of a step, in any shape."""
    torch.manual_seed(0)
    a, b = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(24, dtype=torch.float64, requires_grad=True)

    def function(a, b, w, v):
        gated = torch.nn.functional.silu(a) * b
        turned = gated.t() * gated.t()
        scaled = gated * 3.0
        return (
            (gated @ w).sum()
            + upper_half(gated, v[:12].view(2, 6)).exp().sum()
            + (gated.view(-1) * v).sum()
            + (turned @ scaled).sum()
        )

    with Rematerialize():
        ours = torch.autograd.grad(function(a, b, w, v), (a, b, w, v))
    for one, other in zip(ours, torch.autograd.grad(function(a, b, w, v), (a, b, w, v)), strict=True):
        assert torch.equal(one, other)


def test_an_input_changed_in_place_before_the_backward_pass_is_an_error():
    a, b, w = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    with Rematerialize():
        c = a * 1.0
        total = ((c * b) @ w).sum()
    with torch.no_grad():
        c.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_an_input_changed_before_its_use_is_kept_as_it_was_used():
    a, b, w = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    with Rematerialize():
        c = a * b
        with torch.no_grad():
            c.add_(1.0)
        (c @ w).sum().backward()
    torch.testing.assert_close(w.grad, (a * b + 1.0).detach().sum(0)[:, None].expand(4, 4))


def test_products_are_recomputed_once_for_each_use():
    """The check that something is made again at all."""
    made = []
    original = rematerialize._unpack

    def counting(kept):
        made.append(kept)
        return original(kept)

    a, b, w = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    context = Rematerialize()
    context._hooks = torch.autograd.graph.saved_tensors_hooks(context._pack, counting)
    with context:
        total = ((torch.nn.functional.silu(a) * b) @ w).sum()
    total.backward()
    assert [node.name() for node, _ in made if not isinstance(node, torch.Tensor)].count("MulBackward0") == 1
