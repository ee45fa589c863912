"""RMSNorm, silu(gate)·up and rotary embeddings on CPU, each in one pass over memory, both ways (csrc/pointwise.cpp)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pact_fast.kernels.runtime import build


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these: all on CPU, in fp32 or all in bf16. Compiles them if they never were."""
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    if any(t.dtype != dtype or t.device.type != "cpu" for t in tensors):
        return False
    return build.status() == "ready"


class RmsNorm(torch.autograd.Function):
    """weight·x/√(mean(x²) + eps) over the last dimension. x [..., D], weight [D]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.recompute = RmsNorm.recompute
        return _norm(x, weight, eps)

    @staticmethod
    def recompute(node: Any) -> torch.Tensor:
        """The result, from what is saved for the backward pass (model/rematerialize.py)."""
        x, weight = node.saved_tensors
        return _norm(x, weight, node.eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, d_weight = _empty(x), _empty(weight) if ctx.needs_input_grad[1] else None
        inputs = grad.contiguous(), x.contiguous(), weight.contiguous()
        torch.ops.pact_fast.rms_norm_backward(*inputs, ctx.eps, dx, d_weight)
        return dx, d_weight, None


class SiluMul(torch.autograd.Function):
    """silu(gate)·up, of one shape."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.recompute = SiluMul.recompute
        return silu_mul(gate, up)

    @staticmethod
    def recompute(node: Any) -> torch.Tensor:
        """The result, from what is saved for the backward pass (model/rematerialize.py)."""
        return silu_mul(*node.saved_tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = _empty(gate), _empty(up)
        torch.ops.pact_fast.silu_mul_backward(grad.contiguous(), gate.contiguous(), up.contiguous(), d_gate, d_up, None)
        return d_gate, d_up


class Rotary(torch.autograd.Function):
    """x∘cos + (−x₂, x₁)∘sin with x = (x₁, x₂). x [1, H, T, D] with contiguous heads, cos and sin [1, T, D]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotary(x, cos, sin, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotary(grad, cos, sin, True), None, None


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    _describe()
    x = x if x.stride(-1) == 1 else x.contiguous()
    # rows outermost, as the projections that the rows come from have them
    out = x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    torch.ops.pact_fast.rotary(x, cos.contiguous(), sin.contiguous(), back, out)
    return out


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _describe()
    out = _empty(x)
    torch.ops.pact_fast.rms_norm(x.contiguous(), weight.contiguous(), eps, out)
    return out


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up, of one shape, without a gradient of its own; the result is contiguous."""
    _describe()
    out = _empty(gate)
    torch.ops.pact_fast.silu_mul(gate.contiguous(), up.contiguous(), out)
    return out


def silu_mul_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of gate and up, and silu(gate)·up. All contiguous; the first result takes the memory of `grad`."""
    d_up, out = _empty(up), _empty(up)
    torch.ops.pact_fast.silu_mul_backward(grad, gate, up, grad, d_up, out)
    return grad, d_up, out


def _empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@functools.cache  # once, when the library is there
def _describe() -> None:
    """What the kernels do to tensors without contents, for estimate/update_trace.py: nothing."""
    for name in ("rms_norm", "rms_norm_backward", "silu_mul", "silu_mul_backward", "rotary"):
        torch.library.register_fake(f"pact_fast::{name}", lambda *args: None)
