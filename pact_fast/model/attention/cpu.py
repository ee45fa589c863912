"""Tree attention on CPU in one pass over tiles of scores (csrc/tree_attention.cpp): bf16 and fp32, no levels, no merging."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pact_fast.kernels.runtime import build

TILE = 64  # rows of q that the kernel works on together


def serves(q: torch.Tensor, v: torch.Tensor, scale: float) -> bool:
    """Whether the kernel takes tensors like these, on this machine. Compiles it if it never was."""
    width = q.shape[-1]
    fits = width % 16 == 0 and width <= 256 and v.shape[-1] == width and scale > 0
    if not fits or q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16):
        return False
    return build.status() == "ready" and torch.ops.pact_fast.tree_attention_ready(q.dtype)


class TreeAttentionCpu(torch.autograd.Function):
    """q [1, Hq, T, D], k, v [1, Hkv, S + T, D], end int64 [S + T]: row i sees key k if k ≤ S + i < end[k]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: torch.Tensor, scale: float
    ) -> torch.Tensor:
        _describe()
        q, k, v = (_by_rows(t) for t in (q, k, v))
        # rows outermost, as the model's output projection reads them: it takes this memory, not a copy of it
        out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        lse = q.new_empty(2, *q.shape[1:3], dtype=torch.float32)  # in two terms
        torch.ops.pact_fast.tree_attention_forward(q, k, v, end, scale, out, lse)
        ctx.save_for_backward(q, k, v, end, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, end, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        _, heads, rows, width = q.shape
        # of whole tiles: dq in fp32 and three numbers for each row
        work = q.new_empty(heads, -(-rows // TILE) * TILE, width + 3, dtype=torch.float32)
        torch.ops.pact_fast.tree_attention_backward(_by_rows(grad), q, k, v, end, ctx.scale, out, lse, work, dq, dk, dv)
        return dq, dk, dv, None, None


def _by_rows(t: torch.Tensor) -> torch.Tensor:
    """The kernel wants the numbers of a head to lie next to each other; rows and heads may lie as they like."""
    return t if t.stride(-1) == 1 else t.contiguous()


@functools.cache  # once, when the library is there
def _describe() -> None:
    """What the kernels do to tensors without contents, for estimate/update_trace.py: nothing."""
    for name in ("tree_attention_forward", "tree_attention_backward"):
        torch.library.register_fake(f"pact_fast::{name}", lambda *args: None)
