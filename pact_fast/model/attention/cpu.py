"""Tree attention on CPU in fp32 and bf16, in one pass over tiles of scores (`csrc/tree_attention.cpp`).

The kernel reads the tree's mask directly, so no partial results have to be merged.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from pact_fast.kernels.runtime import build
from pact_fast.model.attention.scores import ScoreRule, sink_gradient

TILE = 64  # query rows of a tile, as in csrc/tree_attention.cpp


def serves(q: torch.Tensor, v: torch.Tensor, scale: float) -> bool:
    """Whether the kernel supports tensors like these on this machine. Compiles the C++ kernels at first use."""
    head_dim = q.shape[-1]
    fits = head_dim % 16 == 0 and head_dim <= 256 and v.shape[-1] == head_dim and scale > 0
    if not fits or q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16):
        return False
    return build.status() == "ready" and torch.ops.pact_fast.tree_attention_ready(q.dtype)


class TreeAttentionCpu(torch.autograd.Function):
    """softmax(rule(q kᵀ) + tree mask) v.

    q [1, Hq, T, D], k and v [1, Hkv, S + T, D] with S cached keys, end int64 [S + T]; row i sees key k if k ≤ S + i <
    end[k]. position: int64 [S + T] of keys, read if there is a window. sinks: [Hq] or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        end: torch.Tensor,
        position: torch.Tensor | None,
        rule: ScoreRule,
    ) -> torch.Tensor:
        _register_fakes()
        q, k, v = (_unit_stride(t) for t in (q, k, v))
        # rows outermost: the layout that the output projection reads, so that it does not copy
        out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        lse = q.new_empty(2, *q.shape[1:3], dtype=torch.float32)  # log-sum-exp in base 2 as a sum of two terms
        fp32_sinks = None if sinks is None else sinks.float().contiguous()
        torch.ops.pact_fast.tree_attention_forward(
            q, k, v, end, rule.scale, out, lse, position, rule.window or 0, rule.softcap or 0.0, fp32_sinks
        )
        ctx.save_for_backward(q, k, v, sinks, end, position, out, lse)
        ctx.rule = rule
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, end, position, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        _, heads, rows, head_dim = q.shape
        # scratch: for every row, padded to whole tiles, dq in fp32 and three more values
        work = q.new_empty(heads, -(-rows // TILE) * TILE, head_dim + 3, dtype=torch.float32)
        scale, window, softcap = ctx.rule
        torch.ops.pact_fast.tree_attention_backward(
            _unit_stride(grad), q, k, v, end, scale, out, lse, work, dq, dk, dv, position, window or 0, softcap or 0.0
        )
        dsinks = None if sinks is None else sink_gradient(grad, out, lse.sum(0, keepdim=True) * math.log(2), sinks)
        return dq, dk, dv, dsinks, None, None, None


def _unit_stride(t: torch.Tensor) -> torch.Tensor:
    """The kernel requires unit stride in the last dimension; rows and heads may have any stride."""
    return t if t.stride(-1) == 1 else t.contiguous()


@functools.cache  # once, after the library is loaded
def _register_fakes() -> None:
    """No-op fake implementations for tracing (`estimate/update_trace.py`): the ops write only to their outputs."""
    for name in ("tree_attention_forward", "tree_attention_backward"):
        torch.library.register_fake(f"pact_fast::{name}", lambda *args: None)
