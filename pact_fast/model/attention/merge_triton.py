"""Merge of partial attention results on CUDA by their log-sum-exp, in fp32: one pass over memory.

Plain torch (`tree.merge_partial`, which is the oracle) takes six passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 8  # rows of one head that a program merges: 4 KiB of fp32 at head_dim = 128
NUM_WARPS = 4


@triton.jit
def _merge_kernel(
    total, lse, part, part_lse, index, first, count,
    total_h, total_t, lse_h, part_h, part_t, part_lse_h,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # rows of the partial result
    h = tl.program_id(1).to(tl.int64)
    valid = j < count
    if index is None:
        row = (first + j).to(tl.int64)
    else:
        row = tl.load(index + j, valid, 0)
    old = tl.load(lse + h * lse_h + row, valid, 0.0)
    new = tl.load(part_lse + h * part_lse_h + j, valid, 0.0)
    maximum = tl.maximum(old, new)
    merged = maximum + tl.log(tl.exp(old - maximum) + tl.exp(new - maximum))
    column = tl.arange(0, BLOCK)
    mask = valid[:, None] & (column < WIDTH)[None, :]
    target = total + h * total_h + row[:, None] * total_t + column[None, :]
    kept = tl.load(target, mask, 0.0) * tl.exp(old - merged)[:, None]
    source = part + h * part_h + j.to(tl.int64)[:, None] * part_t + column[None, :]
    added = tl.load(source, mask, 0.0).to(tl.float32) * tl.exp(new - merged)[:, None]
    tl.store(target, kept + added, mask)
    tl.store(lse + h * lse_h + row, merged, valid)


def merge(
    total: torch.Tensor, lse: torch.Tensor, rows: slice | torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> None:
    """Update total and lse in place to the attention over the keys of both results.

    Args:
        total: fp32 [1, H, T, D], unit stride in D.
        lse: fp32 [1, H, T], unit stride in T.
        rows: The n rows of total that `part` belongs to; a slice or int64 [n].
        part: [1, H, n, D] in any dtype, unit stride in D.
        part_lse: fp32 [1, H, n], unit stride in n.
    """
    _, heads, n, width = part.shape
    index, first = (None, rows.start) if isinstance(rows, slice) else (rows, 0)
    _merge_kernel[(triton.cdiv(n, ROWS), heads)](
        total, lse, part, part_lse, index, first, n,
        total.stride(1), total.stride(2), lse.stride(1), part.stride(1), part.stride(2), part_lse.stride(1),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ROWS=ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip


def specialisations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constexprs, num_warps) for triton.compile, of the variants that tests compile."""
    types = {"total": "*fp32", "lse": "*fp32", "part_lse": "*fp32", "index": "*i64"}
    for width in (64, 80, 128, 256):
        for part, index in (("*bf16", "*i64"), ("*fp16", None), ("*bf16", None)):
            constexprs: dict[str, Any] = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "ROWS": ROWS}
            if index is None:
                constexprs["index"] = None
            known = {**types, "part": part, **dict.fromkeys(constexprs, "constexpr")}
            yield _merge_kernel, {n: known.get(n, "i32") for n in _merge_kernel.arg_names}, constexprs, NUM_WARPS
