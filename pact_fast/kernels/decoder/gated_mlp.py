"""The gated MLP down(silu(gate(x))·up(x)) on CPU as one step of autograd (csrc/pointwise.cpp does what is not a product).

As steps of their own, down has to have silu(gate)·up before the gradients of gate and up are made from the same numbers.
Together, one pass over memory makes all three, and dL/dx is one sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from pact_fast.kernels.decoder.pointwise import silu_mul, silu_mul_backward

Tensor = torch.Tensor


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x [..., D], gate and up [F, D], down [D, F], of one dtype that `serves` takes; the result is as large as x."""
    tensors = (x, gate, up, down)
    if has_torch_function(tensors):  # function modes, which see no autograd functions: model/rematerialize.py
        return handle_torch_function(gated_mlp, tensors, *tensors)
    return _GatedMlp.apply(*tensors)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        a, b = x @ gate.t(), x @ up.t()
        ctx.save_for_backward(x, gate, up, down, a, b)
        return silu_mul(a, b) @ down.t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, a, b = ctx.saved_tensors
        of_x, of_gate, of_up, of_down = ctx.needs_input_grad
        g, rows, a, b = (_rows(t) for t in (grad, x, a, b))
        d_a, d_b, product = silu_mul_backward(g @ down, a, b)
        d_down = g.t() @ product if of_down else None
        del product
        dx = torch.addmm(d_a @ gate, d_b, up).view(x.shape) if of_x else None
        return dx, d_a.t() @ rows if of_gate else None, d_b.t() @ rows if of_up else None, d_down


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
