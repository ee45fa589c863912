"""Attention over a packed tree, exact in forward and backward.

On CPU a kernel of our own takes the tree's mask as it is (cpu.py). Where there are ordinary flash kernels only, the
mask falls apart into dense calls (`PackedBatch.calls`): one causal call over all runs, and one whole call for each further
level of ancestors. A row that takes part in several has its partial results merged by log-sum-exp. Autograd through that
merge would be silently wrong, because flash kernels drop the gradient of the log-sum-exp. Instead each kernel's raw backward
gets the *merged* output and the merged log-sum-exp: its softmax is then the global one, and dQ, dK, dV simply add up.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from pact_fast.batch.packing import Call, PackedBatch, Span
from pact_fast.model.attention import cpu
from pact_fast.model.attention.flash import Flash, flash_for
from pact_fast.model.attention.prefix_cache import PathCache
from pact_fast.model.attention.ulysses import RowShards


class TreeLayout:
    """What attention needs of a PackedBatch. `after`: so many keys of a kept path come first, and every row sees them."""

    def __init__(self, batch: PackedBatch, device: torch.device | str = "cpu", after: int = 0):
        self.calls = [call for call in batch.calls if call.spans]
        if after:
            shifted = [Call([Span(*s[:2], s.k0 + after, s.k1 + after) for s in c.spans], c.causal) for c in self.calls]
            self.calls = [*shifted, Call([Span(0, len(batch), 0, after)], False)]
        self.keep: PathCache | None = None  # where to store keys and values, see tree_forward
        self.cache: PathCache | None = None  # whose keys come first, see branches_forward
        self.row_shards: RowShards | None = None  # the rows of this process, see tree_forward
        self._after = after
        self._subtree_end = torch.as_tensor(batch.subtree_end, device=device)
        # row i sees key k if k ≤ after + i < end[k]
        self.end = torch.nn.functional.pad(self._subtree_end + after, (after, 0), value=after + len(batch))
        self._mask: torch.Tensor | None = None
        self._flash: tuple[torch.dtype, Flash | None] | None = None

    def flash(self, q: torch.Tensor) -> Flash | None:
        """The kernel for queries like q, the same for all layers; None: `mask` has to serve."""
        if self._flash is None or self._flash[0] != q.dtype:
            self._flash = q.dtype, flash_for(q)
        return self._flash[1]

    def mask(self) -> torch.Tensor:
        """bool [T, after + T]: row q sees key k."""
        if self._mask is None:
            self._mask = torch.nn.functional.pad(tree_mask(self._subtree_end), (self._after, 0), value=True)
        return self._mask


def tree_mask(subtree_end: torch.Tensor) -> torch.Tensor:
    """bool [T, T] from subtree_end [T]: k ≤ q < subtree_end[k]."""
    rows = torch.arange(len(subtree_end), device=subtree_end.device)
    return (rows[None] <= rows[:, None]) & (rows[:, None] < subtree_end[None])


@torch.compiler.disable  # raw kernels and their raw backwards: nothing for a compiler to fuse
def tree_attention(
    q: torch.Tensor,  # [1, Hq, T, D]
    k: torch.Tensor,  # [1, Hkv, T, D]
    v: torch.Tensor,  # [1, Hkv, T, D]
    layout: TreeLayout,
    *,
    scale: float,
) -> torch.Tensor:  # [1, Hq, T, D]
    """softmax(scale · q kᵀ + tree mask) v. Hkv divides Hq (grouped queries).

    Our own kernel serves CPU (bf16, fp32; heads of a multiple of 16 numbers, up to 256), torch's flash kernels other tensors
    on CPU and bf16 and fp16 on CUDA, a dense mask everything else.
    """
    if torch.is_autocast_enabled(q.device.type):  # norms leave q and k in fp32 there
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if cpu.serves(q, v, scale):
        return cpu.TreeAttentionCpu.apply(q, k, v, layout.end, scale)
    flash = layout.flash(q)
    if flash is not None:
        return _TreeAttention.apply(q, k, v, layout.calls, scale, flash)
    mask = layout.mask()
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, calls: list[Call], scale: float, flash: Flash
    ) -> torch.Tensor:
        first, *levels = calls
        out, lse = flash.forward(q, k, v, first, scale)
        if levels:
            lse = lse.to(torch.promote_types(q.dtype, torch.float32), copy=True)
            total = out.to(lse.dtype)
            for call in levels:
                rows = flash.rows(call)
                _merge(total, lse, rows, *flash.forward(q, k, v, call, scale))
            out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.scale, ctx.flash = calls, scale, flash
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        sums = [torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (q, k, v)]
        for call in ctx.calls:
            ctx.flash.backward(grad, q, k, v, out, lse, call, ctx.scale, *sums)
        return *(d.to(q.dtype) for d in sums), None, None, None


def _merge(
    total: torch.Tensor, lse: torch.Tensor, rows: slice | torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Fold a partial result [1, H, n, D] with its log-sum-exp [1, H, n] into the rows of (total, lse), in fp32 or fp64."""
    if total.is_cuda and importlib.util.find_spec("triton") is not None:
        from pact_fast.model.attention.merge_triton import merge

        return merge(total, lse, rows, part, part_lse)
    old = lse[:, :, rows]
    merged = torch.logaddexp(old, part_lse.to(lse.dtype))
    kept = total[:, :, rows] * (old - merged).exp_()[..., None]
    total[:, :, rows] = kept.addcmul_(part.to(total.dtype), (part_lse - merged).exp_()[..., None])
    lse[:, :, rows] = merged
