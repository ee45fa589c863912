"""Fingerprints of weights on CUDA (kernels/fingerprint.py): one pass over memory, exact integer sums, no atomics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 8, 512  # of a program's tile: 16 elements per thread, and b is read once for 8 rows
NUM_WARPS = 8


@triton.jit
def _fingerprint_kernel(
    bits, a, b, out, rows, columns, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    source = bits + row[:, None] * row_stride
    total = tl.zeros([ROWS, COLUMNS], tl.int64)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = column < columns
        element = tl.load(source + column[None, :], inside[:, None] & valid[None, :], 0)
        total += element.to(tl.int64) * tl.load(b + column, valid, 0)[None, :]
    by_row = tl.sum(total, axis=1) * tl.load(a + row, inside, 0)
    tl.store(out + program, tl.sum(by_row, axis=0))


def row_block_sums(bits: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int64 [⌈R/8⌉]: Σ bits_ij·a_i·b_j mod 2⁶⁴ of every 8 rows.

    Args:
        bits: int8, int16 or int32 [R, C], unit stride in C.
        a: int64 [R].
        b: int64 [C].
    """
    rows, columns = bits.shape
    out = torch.empty(triton.cdiv(rows, ROWS), dtype=torch.int64, device=bits.device)
    _fingerprint_kernel[(len(out),)](
        bits, a, b, out, rows, columns, bits.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS
    )
    return out


def specialisations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constexprs, num_warps) for triton.compile, of the variants that tests compile."""
    constexprs = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    vectors = {"a": "*i64", "b": "*i64", "out": "*i64", **dict.fromkeys(constexprs, "constexpr")}
    for dtype in ("*i8", "*i16", "*i32"):
        known = {"bits": dtype, **vectors}
        signature = {name: known.get(name, "i32") for name in _fingerprint_kernel.arg_names}
        yield _fingerprint_kernel, signature, constexprs, NUM_WARPS
