"""Tree attention in torch for every score rule, dtype and device: exact, in blocks of rows, with recomputed scores.

Serves the cases that the kernels do not. Memory is linear in the number of rows; keys that no row of a block
sees are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pact_fast.model.attention.scores import ScoreRule, sink_gradient

ROWS = 128  # rows of a block


class Block(NamedTuple):
    """Rows [first, last) and the keys [low, high) among which are all that they see; mask bool [rows, keys]."""

    rows: slice
    keys: slice
    mask: torch.Tensor


def mask_blocks(
    end: np.ndarray, position: np.ndarray, rows: int, window: int | None, device: torch.device | str
) -> list[Block]:
    """The mask by blocks of rows. end, position: int64 [S + T], of keys; the T rows stand where the last T keys do."""
    prefix = len(end) - rows
    key = np.arange(len(end))
    blocks = []
    for first in range(0, rows, ROWS):
        row = np.arange(prefix + first, prefix + min(first + ROWS, rows))
        mask = (key <= row[:, None]) & (row[:, None] < end)
        if window is not None:
            mask &= position > position[row, None] - window
        seen = np.flatnonzero(mask.any(0))
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        blocks.append(Block(slice(first, first + len(row)), keys, torch.as_tensor(mask[:, keys].copy(), device=device)))
    return blocks


class BlockAttention(torch.autograd.Function):
    """softmax(rule(q kᵀ) + tree mask) v. q [1, Hq, T, D]; k and v [1, Hkv, S + T, ·]; sinks [Hq] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        rule: ScoreRule,
        blocks: list[Block],
    ) -> torch.Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        groups = k.shape[1]
        # rows outermost: the layout that the output projection reads, so that it does not copy
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        for rows, keys, mask in blocks:
            scores, _ = _scores(_grouped(q[:, :, rows], groups).to(wide), k[0, :, None, keys].to(wide), rule, mask)
            total = scores.logsumexp(-1)
            if sinks is not None:
                total = torch.logaddexp(total, sinks.to(wide).view(groups, -1, 1))
            p = (scores - total[..., None]).exp_()
            out[0, :, rows] = (p @ v[0, :, None, keys].to(wide)).flatten(0, 1).to(q.dtype)
            lse[0, :, rows] = total.flatten(0, 1)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.rule, ctx.blocks = rule, blocks
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        wide, groups, rule = lse.dtype, k.shape[1], ctx.rule
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (k, v))
        for rows, keys, mask in ctx.blocks:
            queries, upstream = (_grouped(t[:, :, rows], groups).to(wide) for t in (q, grad))
            delta = (upstream * _grouped(out[:, :, rows], groups).to(wide)).sum(-1, keepdim=True)
            seen, values = (t[0, :, None, keys].to(wide) for t in (k, v))
            scores, slope = _scores(queries, seen, rule, mask)
            p = (scores - _grouped(lse[..., None][:, :, rows], groups)).exp_()
            dv[0, :, keys] += (p.mT @ upstream).sum(1)
            ds = p.mul_(upstream @ values.mT - delta)
            if slope is not None:
                ds.mul_(slope)
            ds.mul_(rule.scale)
            dq[0, :, rows] = (ds @ seen).flatten(0, 1).to(q.dtype)
            dk[0, :, keys] += (ds.mT @ queries).sum(1)
        dsinks = None if sinks is None else sink_gradient(grad, out, lse, sinks)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None


def _grouped(t: torch.Tensor, groups: int) -> torch.Tensor:
    """[1, Hq, n, D] → [Hkv, Hq / Hkv, n, D]: the queries that share a head of keys."""
    return t[0].unflatten(0, (groups, -1))


def _scores(
    q: torch.Tensor, k: torch.Tensor, rule: ScoreRule, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(masked scores, their derivative by scale·q kᵀ; None where it is 1)."""
    scores, slope = (q @ k.mT).mul_(rule.scale), None
    if rule.softcap is not None:
        capped = torch.tanh(scores / rule.softcap)
        scores, slope = capped * rule.softcap, 1 - capped.square()
    return scores.masked_fill_(~mask, -torch.inf), slope
