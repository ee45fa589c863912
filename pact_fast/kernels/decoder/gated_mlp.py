"""Gated MLP down(silu(gate(x))·up(x)) on CPU as one autograd function: torch's GEMMs, pointwise steps in csrc/pointwise.cpp.

As separate autograd functions, the backward pass would read the activations of gate and up twice: for silu(gate)·up, which
dW of down needs, and for their own gradients. Here one pass over memory computes all three, and dL/dx is one sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from pact_fast.kernels.decoder.pointwise import silu_mul, silu_mul_backward

Tensor = torch.Tensor


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x))·up(x)), in the shape of x.

    Args:
        x: [..., D], on CPU, of a dtype that `pointwise.serves` accepts.
        gate: [F, D] weight, same dtype.
        up: [F, D].
        down: [D, F].
    """
    tensors = (x, gate, up, down)
    if has_torch_function(tensors):  # torch function modes do not see autograd functions: model/rematerialize.py
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
        x_grad, gate_grad, up_grad, down_grad = ctx.needs_input_grad
        g, rows, a, b = (_rows(t) for t in (grad, x, a, b))
        d_a, d_b, activation = silu_mul_backward(g @ down, a, b)
        d_down = g.t() @ activation if down_grad else None
        del activation
        dx = torch.addmm(d_a @ gate, d_b, up).view(x.shape) if x_grad else None
        return dx, d_a.t() @ rows if gate_grad else None, d_b.t() @ rows if up_grad else None, d_down


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
