"""Sliding windows on CUDA: one variable-length launch of torch's flash kernel per layer.

Of every run of rows, the kernel gets the keys of the path before it as far as the window reaches, and then its own. These
are consecutive positions, so the kernel's own window, aligned with the last key, is the window along the path. Keys before
a run are copied; nothing is merged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pact_fast.batch.packing import AttentionSpan
from pact_fast.model.attention import flash_cuda
from pact_fast.model.attention.scores import add_sinks, sink_gradient


class WindowPlan(NamedTuple):
    """Keys of every run in the order of runs.

    keys     int64 [n] of all runs, repeated where several runs see them
    runs     per run: keys before its own, as an index, and its own keys
    varlen   arguments of the kernel
    window   positions that a row sees, its own included
    """

    keys: torch.Tensor
    runs: list[tuple[torch.Tensor, slice]]
    varlen: flash_cuda._VarlenPlan
    window: int


def window_plan(
    runs: list[AttentionSpan], end: np.ndarray, rows: int, window: int, device: torch.device | str
) -> WindowPlan:
    """The plan of a pack.

    Args:
        runs: Spans of the pack's causal call, in the order of rows.
        end: int64 [S + T] of keys: row i sees key k if k ≤ S + i < end[k].
        rows: T.
        window: Positions that a row sees, its own included.
        device: Of the tensors.
    """
    prefix = len(end) - rows
    befores = [_path_before(end, prefix + run.q0, window - 1) for run in runs]
    owns = [slice(prefix + run.q0, prefix + run.q1) for run in runs]
    keys = np.concatenate([part for b, own in zip(befores, owns, strict=True) for part in (b, np.r_[own])])
    counts = [len(b) + own.stop - own.start for b, own in zip(befores, owns, strict=True)]
    queries = [run.q1 - run.q0 for run in runs]
    varlen = flash_cuda._VarlenPlan(
        _cumulative(queries, device), _cumulative(counts, device), max(queries), max(counts), slice(0, rows)
    )
    indices = [torch.as_tensor(b, device=device) for b in befores]
    return WindowPlan(torch.as_tensor(keys, device=device), list(zip(indices, owns, strict=True)), varlen, window)


def _path_before(end: np.ndarray, key: int, count: int) -> np.ndarray:
    """The last `count` keys of the path before a key."""
    seen = np.flatnonzero(end[:key] > key)
    return seen[max(len(seen) - count, 0) :]


def _cumulative(lengths: list[int], device: torch.device | str) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


class WindowAttention(torch.autograd.Function):
    """softmax(scale · q kᵀ + tree mask + window) v. q [1, Hq, T, D]; k, v [1, Hkv, S + T, D]; sinks [Hq] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        plan: WindowPlan,
        scale: float,
    ) -> torch.Tensor:
        rows, keys, values = (t[0].transpose(0, 1) for t in (q, k, v))
        out, lse = flash_cuda.varlen_forward(
            rows, keys[plan.keys], values[plan.keys], plan.varlen, True, scale, window=plan.window
        )
        out, lse = out.transpose(0, 1)[None], lse[None]
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        plan = ctx.plan
        rows, keys, values, results, upstream = (t[0].transpose(0, 1) for t in (q, k, v, out, grad))
        dq, *parts = flash_cuda.varlen_backward(
            upstream.contiguous(), rows, keys[plan.keys], values[plan.keys], results.contiguous(), lse[0].contiguous(),
            plan.varlen, True, ctx.scale, window=plan.window,
        )  # fmt: skip
        dk, dv = (_add_up(part, like, plan, lse.dtype) for part, like in zip(parts, (keys, values), strict=True))
        dsinks = None if sinks is None else sink_gradient(grad, out, lse, sinks)
        return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None], dsinks, None, None


def _add_up(part: torch.Tensor, like: torch.Tensor, plan: WindowPlan, dtype: torch.dtype) -> torch.Tensor:
    """Gradients of the runs' keys [n, H, D] as gradients of the keys; one run at a time, so in a fixed order."""
    total = torch.zeros(like.shape, dtype=dtype, device=like.device)
    start = 0
    for before, own in plan.runs:
        middle = start + len(before)
        total[before] += part[start:middle]
        start = middle + own.stop - own.start
        total[own] += part[middle:start]
    return total.to(like.dtype)
