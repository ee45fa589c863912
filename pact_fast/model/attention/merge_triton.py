"""Folding partial attention results into running ones on CUDA: one read and one write of everything, in fp32.

Plain torch takes six passes over the same memory (attention._merge, the oracle).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 8  # of one head, worked on by a program: 4 KiB of fp32 at a head width of 128
NUM_WARPS = 4


@triton.jit
def _merge_kernel(
    total, lse, part, part_lse, index, first, count,
    total_h, total_t, lse_h, part_h, part_t, part_lse_h,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # rows of the part
    h = tl.program_id(1).to(tl.int64)
    here = j < count
    if index is None:
        row = (first + j).to(tl.int64)
    else:
        row = tl.load(index + j, here, 0)
    old = tl.load(lse + h * lse_h + row, here, 0.0)
    new = tl.load(part_lse + h * part_lse_h + j, here, 0.0)
    top = tl.maximum(old, new)
    merged = top + tl.log(tl.exp(old - top) + tl.exp(new - top))
    column = tl.arange(0, BLOCK)
    mask = here[:, None] & (column < WIDTH)[None, :]
    target = total + h * total_h + row[:, None] * total_t + column[None, :]
    kept = tl.load(target, mask, 0.0) * tl.exp(old - merged)[:, None]
    source = part + h * part_h + j.to(tl.int64)[:, None] * part_t + column[None, :]
    added = tl.load(source, mask, 0.0).to(tl.float32) * tl.exp(new - merged)[:, None]
    tl.store(target, kept + added, mask)
    tl.store(lse + h * lse_h + row, merged, here)


def merge(
    total: torch.Tensor,  # [1, H, T, D] fp32, changed
    lse: torch.Tensor,  # [1, H, T] fp32, changed
    rows: slice | torch.Tensor,  # the n rows of total that part belongs to
    part: torch.Tensor,  # [1, H, n, D]
    part_lse: torch.Tensor,  # [1, H, n] fp32
) -> None:
    """total, lse ← the results over both sets of keys. Unit stride in D, and along the rows of lse and part_lse."""
    _, heads, n, width = part.shape
    index, first = (None, rows.start) if isinstance(rows, slice) else (rows, 0)
    _merge_kernel[(triton.cdiv(n, ROWS), heads)](
        total, lse, part, part_lse, index, first, n,
        total.stride(1), total.stride(2), lse.stride(1), part.stride(1), part.stride(2), part_lse.stride(1),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ROWS=ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip


def specialisations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constexprs, num_warps), as triton.compile wants them, of the variants worth checking."""
    types = {"total": "*fp32", "lse": "*fp32", "part_lse": "*fp32", "index": "*i64"}
    for width in (64, 80, 128, 256):
        for part, index in (("*bf16", "*i64"), ("*fp16", None), ("*bf16", None)):
            constexprs: dict[str, Any] = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "ROWS": ROWS}
            if index is None:
                constexprs["index"] = None
            known = {**types, "part": part, **dict.fromkeys(constexprs, "constexpr")}
            yield _merge_kernel, {n: known.get(n, "i32") for n in _merge_kernel.arg_names}, constexprs, NUM_WARPS
