"""Attention over a packed tree, exact in forward and backward.

Each segment is a dense attention call; a row that takes part in several has its partial results merged by log-sum-exp.
Autograd through that merge would be silently wrong, because flash kernels drop the gradient of the log-sum-exp. Instead each
kernel's raw backward gets the *merged* output and the merged log-sum-exp: its softmax is then the global one, and dQ, dK, dV
simply add up.
"""

from __future__ import annotations

import torch

from pact_fast.tree.packing import PackedBatch, Segment


class TreeLayout:
    """What attention needs of a PackedBatch: the segments (CPU flash calls) and the mask (elsewhere)."""

    def __init__(self, batch: PackedBatch, device: torch.device | str = "cpu"):
        self.segments = batch.segments
        self._subtree_end = torch.as_tensor(batch.subtree_end, device=device)
        self._mask: torch.Tensor | None = None

    def mask(self) -> torch.Tensor:
        """bool [T, T]: row q sees row k."""
        if self._mask is None:
            self._mask = tree_mask(self._subtree_end)
        return self._mask


def tree_mask(subtree_end: torch.Tensor) -> torch.Tensor:
    """bool [T, T] from subtree_end [T]: k ≤ q < subtree_end[k]."""
    rows = torch.arange(len(subtree_end), device=subtree_end.device)
    return (rows[None] <= rows[:, None]) & (rows[:, None] < subtree_end[None])


def tree_attention(
    q: torch.Tensor,  # [B, Hq, T, D]
    k: torch.Tensor,  # [B, Hkv, T, D]
    v: torch.Tensor,  # [B, Hkv, T, D]
    layout: TreeLayout,
    *,
    scale: float,
) -> torch.Tensor:  # [B, Hq, T, D]
    """softmax(scale · q kᵀ + tree mask) v. Hkv divides Hq (grouped queries)."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if q.device.type == "cpu":
        return _SegmentAttention.apply(q, k, v, layout.segments, scale)
    mask = layout.mask()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class _SegmentAttention(torch.autograd.Function):
    """CPU: one flash call per segment, merged."""

    @staticmethod
    def forward(ctx, q, k, v, segments: list[Segment], scale: float):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        accumulate = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=accumulate)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulate)
        for s in segments:
            queries = q[:, :, s.start : s.end]
            for a, b, causal in _ranges(s):
                part, part_lse = flash(queries, k[:, :, a:b], v[:, :, a:b], 0.0, causal, scale=scale)
                old = lse[:, :, s.start : s.end]
                merged = torch.logaddexp(old, part_lse.to(accumulate))
                here = out[:, :, s.start : s.end]
                here.mul_((old - merged).exp_()[..., None]).add_(part * (part_lse - merged).exp_()[..., None])
                lse[:, :, s.start : s.end] = merged
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = (torch.zeros(t.shape, dtype=lse.dtype) for t in (q, k, v))
        grad = grad.contiguous()
        for s in ctx.segments:
            rows = slice(s.start, s.end)
            for a, b, causal in _ranges(s):
                parts = flash_backward(
                    grad[:, :, rows], q[:, :, rows], k[:, :, a:b], v[:, :, a:b],
                    out[:, :, rows], lse[:, :, rows], 0.0, causal, scale=ctx.scale,
                )  # fmt: skip
                dq[:, :, rows] += parts[0]
                dk[:, :, a:b] += parts[1]
                dv[:, :, a:b] += parts[2]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _ranges(segment: Segment) -> list[tuple[int, int, bool]]:
    ranges = [(a, b, False) for a, b in segment.prefix]
    return [*ranges, (segment.start, segment.end, True)] if segment.causal else ranges
