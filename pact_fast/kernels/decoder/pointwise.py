"""RMSNorm, SwiGLU's silu(gate)·up and rotary embeddings on CPU, one pass over memory each way (csrc/pointwise.cpp)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pact_fast.kernels.runtime import build


def serves(*tensors: torch.Tensor) -> bool:
    """True if the kernels support these tensors: on CPU, all fp32 or all bf16. Compiles the library unless it is cached."""
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
        return rms_norm(x, weight, eps)

    @staticmethod
    def recompute(node: Any) -> torch.Tensor:
        """The forward result, from the saved tensors of an autograd node (for model/rematerialize.py)."""
        x, weight = node.saved_tensors
        return rms_norm(x, weight, node.eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, d_weight = _empty(x), _empty(weight) if ctx.needs_input_grad[1] else None
        inputs = grad.contiguous(), x.contiguous(), weight.contiguous()
        torch.ops.pact_fast.rms_norm_backward(*inputs, ctx.eps, dx, d_weight)
        return dx, d_weight, None


class SiluMul(torch.autograd.Function):
    """silu(gate)·up, elementwise; both of the same shape."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.recompute = SiluMul.recompute
        return silu_mul(gate, up)

    @staticmethod
    def recompute(node: Any) -> torch.Tensor:
        """The forward result, from the saved tensors of an autograd node (for model/rematerialize.py)."""
        return silu_mul(*node.saved_tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = _empty(gate), _empty(up)
        torch.ops.pact_fast.silu_mul_backward(grad.contiguous(), gate.contiguous(), up.contiguous(), d_gate, d_up, None)
        return d_gate, d_up


class Rotary(torch.autograd.Function):
    """Rotary position embedding x∘cos + (−x₂, x₁)∘sin with x = (x₁, x₂) the halves of the last dimension.

    x [1, H, T, D], cos and sin [1, T, D], as `apply_rotary_pos_emb` of transformers has them (arXiv 2104.09864).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotary(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotary(grad, cos, sin, inverse=True), None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """Rotary embedding without autograd; see `Rotary`. `inverse` rotates back."""
    _register_fakes()
    x = x if x.stride(-1) == 1 else x.contiguous()
    # memory order [T, H, D], as the projections that produce x have it
    out = x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
    torch.ops.pact_fast.rotary(x, cos.contiguous(), sin.contiguous(), inverse, out)
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm without autograd; see `RmsNorm`."""
    _register_fakes()
    out = _empty(x)
    torch.ops.pact_fast.rms_norm(x.contiguous(), weight.contiguous(), eps, out)
    return out


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate)·up without autograd; both of the same shape, the result contiguous."""
    _register_fakes()
    out = _empty(gate)
    torch.ops.pact_fast.silu_mul(gate.contiguous(), up.contiguous(), out)
    return out


def silu_mul_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(dL/dgate, dL/dup, silu(gate)·up). All tensors contiguous; the first result overwrites `grad`."""
    d_up, out = _empty(up), _empty(up)
    torch.ops.pact_fast.silu_mul_backward(grad, gate, up, grad, d_up, out)
    return grad, d_up, out


def _empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@functools.cache  # once, after the library is loaded
def _register_fakes() -> None:
    """Register no-op fake implementations, for estimate/update_trace.py: the ops only write to their outputs."""
    for name in ("rms_norm", "rms_norm_backward", "silu_mul", "silu_mul_backward", "rotary"):
        torch.library.register_fake(f"pact_fast::{name}", lambda *args: None)
