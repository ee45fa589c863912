"""Attention over a packed tree, exact in forward and backward.

On CPU, a kernel of this package reads the tree's mask directly (cpu.py). With ordinary flash kernels, the mask is
decomposed into dense calls (`PackedBatch.calls`): one causal call over all runs, and one non-causal call for each
further level of ancestors. Partial results of a row are merged by their log-sum-exp.

Autograd through that merge would be silently wrong, because flash kernels drop the gradient of the log-sum-exp.
Instead, each kernel's raw backward is given the merged output and the merged log-sum-exp: its softmax is then the
softmax over all keys of the row, and the calls' contributions to dQ, dK and dV add up.

Windows, soft-caps and attention sinks (`ScoreRule`) that none of these kernels computes take blocks.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch

from pact_fast.batch.packing import AttentionCall, AttentionSpan, PackedBatch
from pact_fast.model.attention import cpu
from pact_fast.model.attention.blocks import Block, BlockAttention, mask_blocks
from pact_fast.model.attention.flash import FlashKernel, select_flash_kernel
from pact_fast.model.attention.prefix_cache import PrefixCache
from pact_fast.model.attention.scores import ScoreRule, add_sinks, sink_gradient
from pact_fast.model.attention.ulysses import RowShards
from pact_fast.model.attention.window_cuda import WindowAttention, WindowPlan, window_plan
from pact_fast.model.recurrence.plan import RecurrencePlan


class TreeLayout:
    """The attention mask of a PackedBatch in the forms that kernels need, and the caches of one forward pass.

    `prefix_length` is the number S of keys of a cached path (PrefixCache). They precede the keys of the T rows, and every
    row sees them.

    calls       dense attention calls, see `PackedBatch.calls`
    end         int64 [S + T]: row i sees key k if k ≤ S + i < end[k]
    position    int64 [S + T] of each key, on its path
    keep        where to store keys and values, see `tree_forward`
    cache       the cached path, see `branches_forward`
    row_shards  the rows of this rank, see `tree_forward`
    recurrence  the pack as recurrent layers compute it
    longest     tokens of the longest path
    """

    def __init__(self, batch: PackedBatch, device: torch.device | str = "cpu", prefix_length: int = 0):
        self.calls = [call for call in batch.calls if call.spans]
        if prefix_length:
            whole_prefix = AttentionCall([AttentionSpan(0, len(batch), 0, prefix_length)], False)
            self.calls = [*(_shift_keys(call, prefix_length) for call in self.calls), whole_prefix]
        self.keep: PrefixCache | None = None
        self.cache: PrefixCache | None = None
        self.row_shards: RowShards | None = None
        self.recurrence = RecurrencePlan(batch.subtree_end, device)
        self.longest = int(batch.position_ids.max(initial=-1)) + 1
        self._prefix_length = prefix_length
        self._batch, self._device = batch, device
        self._blocks: dict[int | None, list[Block]] = {}  # by window
        self._window_plans: dict[int, WindowPlan] = {}
        self._subtree_end = torch.as_tensor(batch.subtree_end, device=device)
        self.end = torch.nn.functional.pad(
            self._subtree_end + prefix_length, (prefix_length, 0), value=prefix_length + len(batch)
        )
        own_position = torch.as_tensor(batch.position_ids, device=device)
        self.position = torch.cat([torch.arange(prefix_length, device=device), own_position])
        self._mask: torch.Tensor | None = None
        self._kernel: tuple[torch.dtype, FlashKernel | None] | None = None

    def flash_kernel(self, q: torch.Tensor) -> FlashKernel | None:
        """The kernel for queries like q, shared by all layers; None if only the dense `mask` can be used."""
        if self._kernel is None or self._kernel[0] != q.dtype:
            self._kernel = q.dtype, select_flash_kernel(q)
        return self._kernel[1]

    def blocks(self, window: int | None) -> list[Block]:
        """The mask of layers with this window, for blocks.py."""
        if window not in self._blocks:
            position = np.concatenate([np.arange(self._prefix_length), self._batch.position_ids])
            self._blocks[window] = mask_blocks(self._host_end(), position, len(self._batch), window, self._device)
        return self._blocks[window]

    def window_plan(self, window: int) -> WindowPlan:
        """The keys of layers with this window, for window_cuda.py."""
        if window not in self._window_plans:
            runs = self._batch.calls[0].spans
            self._window_plans[window] = window_plan(runs, self._host_end(), len(self._batch), window, self._device)
        return self._window_plans[window]

    def _host_end(self) -> np.ndarray:
        prefix, rows = self._prefix_length, len(self._batch)
        return np.concatenate([np.full(prefix, prefix + rows), self._batch.subtree_end + prefix])

    def mask(self) -> torch.Tensor:
        """bool [T, S + T]: True where row q sees key k."""
        if self._mask is None:
            self._mask = torch.nn.functional.pad(tree_mask(self._subtree_end), (self._prefix_length, 0), value=True)
        return self._mask


def _shift_keys(call: AttentionCall, offset: int) -> AttentionCall:
    return AttentionCall([AttentionSpan(s.q0, s.q1, s.k0 + offset, s.k1 + offset) for s in call.spans], call.causal)


def tree_mask(subtree_end: torch.Tensor) -> torch.Tensor:
    """The dense mask, bool [T, T]: row q sees key k if k ≤ q < subtree_end[k]. subtree_end: int64 [T]."""
    rows = torch.arange(len(subtree_end), device=subtree_end.device)
    return (rows[None] <= rows[:, None]) & (rows[:, None] < subtree_end[None])


@torch.compiler.disable  # raw kernels and their raw backwards: there is nothing for a compiler to fuse
def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TreeLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ + tree mask) v, with the rules of a layer for its scores.

    On CPU in fp32 and bf16 with heads of a multiple of 16 elements, up to 256, this is the kernel of cpu.py. Other
    tensors on CPU, and bf16 and fp16 on CUDA, use torch's flash kernels; windows and soft-caps that these do not compute
    take blocks.py, everything else a dense mask.

    Args:
        q: [1, Hq, T, D].
        k: [1, Hkv, S + T, D], with S cached keys. Hkv divides Hq (grouped-query attention).
        v: [1, Hkv, S + T, D].
        layout: The mask.
        scale: Factor of the scores, usually D^-0.5.
        window: A row sees keys at most window − 1 positions before its own, along its path.
        softcap: Scores s become softcap · tanh(s / softcap).
        sinks: [Hq] attention sinks: one further score per head, in the softmax, without a value.

    Returns:
        [1, Hq, T, D] in the dtype of q, under autocast in its dtype.
    """
    if torch.is_autocast_enabled(q.device.type):  # the models' norms return fp32 under autocast
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if window is not None and window >= layout.longest:
        window = None
    rule = ScoreRule(scale, window, softcap)
    if cpu.serves(q, v, scale):
        return cpu.TreeAttentionCpu.apply(q, k, v, sinks, layout.end, layout.position if window else None, rule)
    kernel = layout.flash_kernel(q) if softcap is None and q.shape[-1] == v.shape[-1] else None
    if kernel is not None and window is None:
        return _TreeAttention.apply(q, k, v, sinks, layout.calls, scale, kernel)
    if kernel is not None and window is not None and kernel.windows:
        return WindowAttention.apply(q, k, v, sinks, layout.window_plan(window), scale)
    if window is not None or softcap is not None or sinks is not None:
        return BlockAttention.apply(q, k, v, sinks, rule, layout.blocks(window))
    if (more := q.shape[-1] - v.shape[-1]) != 0:  # latent attention; the kernels above take heads of one width
        pad = torch.nn.functional.pad
        q, k, wide = (pad(q, (0, -more)), pad(k, (0, -more)), v) if more < 0 else (q, k, pad(v, (0, more)))
        return tree_attention(q, k, wide, layout, scale=scale)[..., : v.shape[-1]]
    mask = layout.mask()
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


class _TreeAttention(torch.autograd.Function):
    """Tree attention by the dense calls of a FlashKernel, merged."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        calls: list[AttentionCall],
        scale: float,
        kernel: FlashKernel,
    ) -> torch.Tensor:
        first, *levels = calls
        out, lse = kernel.forward(q, k, v, first, scale)
        if levels:
            lse = lse.to(torch.promote_types(q.dtype, torch.float32), copy=True)
            total = out.to(lse.dtype)
            for call in levels:
                rows = kernel.rows(call)
                merge_partial(total, lse, rows, *kernel.forward(q, k, v, call, scale))
            out = total
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.calls, ctx.scale, ctx.kernel = calls, scale, kernel
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        sums = [torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (q, k, v)]
        for call in ctx.calls:
            ctx.kernel.backward(grad, q, k, v, out, lse, call, ctx.scale, *sums)
        dsinks = None if sinks is None else sink_gradient(grad, out, lse, sinks)
        return *(d.to(q.dtype) for d in sums), dsinks, None, None, None


def merge_partial(
    total: torch.Tensor, lse: torch.Tensor, rows: slice | torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Merge a partial result into the rows of total [1, H, T, D] and lse [1, H, T], in place and in their dtype.

    part [1, H, n, D] and part_lse [1, H, n] are the attention of the rows to other keys:
    lse' = log(exp(lse) + exp(part_lse)), total' = exp(lse − lse') · total + exp(part_lse − lse') · part.
    """
    if total.is_cuda and importlib.util.find_spec("triton") is not None:
        from pact_fast.model.attention.merge_triton import merge

        return merge(total, lse, rows, part, part_lse)
    old = lse[:, :, rows]
    merged = torch.logaddexp(old, part_lse.to(lse.dtype))
    kept = total[:, :, rows] * (old - merged).exp_()[..., None]
    total[:, :, rows] = kept.addcmul_(part.to(total.dtype), (part_lse - merged).exp_()[..., None])
    lse[:, :, rows] = merged
