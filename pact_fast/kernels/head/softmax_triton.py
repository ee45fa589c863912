"""Softmax passes of the head in Triton, fp32 logits on CUDA; the functions of softmax_torch.py, bound by memory traffic.

z is fp32 [n, V] with unit column stride and any row stride; a stride that is a multiple of 16 gets 16-byte accesses.
[n] tensors are contiguous: int64 for target, source and partner, fp32 otherwise. Memory traffic per row, in bytes:

    forward      4·V read; 4·V written only where bias, softcap or the row's temperature changes the logits
    divergence   8·V read
    backward     4·V read (8·V with a pairing), one element of `out` per logit written

One program owns a row and loops over it in tiles of [DEPTH, LANES] logits. A lane is a column of the tile and belongs
to one thread, which keeps its own running sums; they are reduced across threads once, at the end of the row. Every sum
has a fixed order, so results are bit-identical from run to run, and short chains of additions (V/LANES terms, then a
tree) keep the fp32 error at about 1e-7.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from pact_fast.kernels.head.softmax_torch import JSD, KL, Pairing, RowStats

NUM_WARPS = 8
LANES = tl.constexpr(NUM_WARPS * 32 * 4)  # four neighbours per thread: one 16-byte access
DEPTH = tl.constexpr(4)  # independent loads in flight per thread; more would cost registers and thereby occupancy
LOWEST = tl.constexpr(-1e30)  # instead of −inf, whose differences are NaN
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _columns(start):
    return start + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _tanh(x):
    """Within a few ulp for every x; libdevice's is slower and unknown to the interpreter."""
    u = tl.exp(-2.0 * tl.abs(x))
    wide = (1.0 - u) / (1.0 + u)
    s = x * x  # Cephes' polynomial where the quotient would cancel
    narrow = -5.70498872745e-3 * s + 2.06390887954e-2
    narrow = narrow * s - 5.37397155531e-2
    narrow = narrow * s + 1.33314422036e-1
    narrow = narrow * s - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, narrow * s * x + x, tl.where(x < 0, -wide, wide))


@triton.jit
def _expm1(x):
    return _tanh(0.5 * x) * (tl.exp(x) + 1.0)


@triton.jit
def _log_ratio(log_p, log_q, KIND: tl.constexpr):
    """log(p/q), or log(p/((p + q)/2)) for a Jensen–Shannon divergence."""
    if KIND == "kl":
        ratio = log_p - log_q
    else:
        d = log_q - log_p
        ratio = LOG_2 - tl.maximum(d, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(d)))
    return ratio


@triton.jit
def _forward_kernel(
    z, target, bias, temperature, logprob, lse, entropy, z_stride,
    VOCAB: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)  # n·V may exceed 2³¹
    row = z + i * z_stride
    t = tl.load(temperature + i)
    inverse = 1.0 / t

    # Per lane: running maximum m, Σ e^(z−m) and Σ e^(z−m)·(z−m)
    m = tl.full([LANES], LOWEST, tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    WHOLE: tl.constexpr = VOCAB // (DEPTH * LANES) * (DEPTH * LANES)
    for TAIL in tl.static_range(2):  # whole tiles without a mask, which would split wide accesses, then the remainder
        for start in range(WHOLE if TAIL else 0, VOCAB if TAIL else WHOLE, DEPTH * LANES):
            columns = _columns(start)
            inside = columns < VOCAB if TAIL else None
            x = tl.load(row + columns, mask=inside)
            if bias is not None:
                x += tl.load(bias + columns, mask=inside)
            if SOFTCAP is not None:
                x = SOFTCAP * _tanh(x * (1.0 / SOFTCAP))
            x *= inverse
            if bias is not None or SOFTCAP is not None or t != 1.0:  # else z already holds the final logits
                tl.store(row + columns, x, mask=inside)
            if TAIL:
                x = tl.where(inside, x, LOWEST)

            top = tl.maximum(m, tl.max(x, axis=0))
            shift = m - top
            scale = tl.exp(shift)
            d = x - top[None, :]
            e = tl.exp(d)
            weighted = scale * (weighted + shift * sums) + tl.sum(e * d, axis=0)
            sums = scale * sums + tl.sum(e, axis=0)
            m = top

    # A lane without logits has m = LOWEST and drops out with scale 0
    top = tl.max(m, axis=0)
    shift = m - top
    scale = tl.exp(shift)
    total = tl.sum(scale * sums, axis=0)
    mean = tl.sum(scale * (weighted + shift * sums), axis=0) / total
    log_total = tl.log(total)
    tl.debug_barrier()  # another thread may have written the target's final logit
    at_target = tl.load(row + tl.load(target + i))
    tl.store(logprob + i, at_target - top - log_total)  # not at_target − lse: keeps the digits where p → 1
    tl.store(lse + i, top + log_total)
    tl.store(entropy + i, log_total - mean)


@triton.jit
def _divergence_kernel(z, lse, partner, divergence, z_stride, VOCAB: tl.constexpr, KIND: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    other = tl.load(partner + i)
    paired = other >= 0
    other = tl.where(paired, other, i)  # a row without a partner is compared with itself, from cache: 0
    row, other_row = z + i * z_stride, z + other * z_stride
    row_lse, other_lse = tl.load(lse + i), tl.load(lse + other)

    sums = tl.zeros([LANES], tl.float32)
    WHOLE: tl.constexpr = VOCAB // (DEPTH * LANES) * (DEPTH * LANES)
    for TAIL in tl.static_range(2):
        for start in range(WHOLE if TAIL else 0, VOCAB if TAIL else WHOLE, DEPTH * LANES):
            columns = _columns(start)
            inside = columns < VOCAB if TAIL else None
            log_p = tl.load(row + columns, mask=inside) - row_lse
            log_q = tl.load(other_row + columns, mask=inside) - other_lse
            term = tl.exp(log_p) * _log_ratio(log_p, log_q, KIND)
            if TAIL:
                term = tl.where(inside, term, 0.0)
            sums += tl.sum(term, axis=0)
    tl.store(divergence + i, tl.where(paired, tl.sum(sums, axis=0), 0.0))


@triton.jit
def _backward_kernel(
    z, out, source, target, temperature, logprob, lse, entropy, g, h, partner, divergence, own, cross,
    z_stride, out_stride, VOCAB: tl.constexpr, SOFTCAP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64)
    i = tl.load(source + j)
    row, place = z + i * z_stride, out + j * out_stride
    t = tl.load(temperature + i)
    inverse = 1.0 / t
    row_lse, row_g, row_target = tl.load(lse + i), tl.load(g + i), tl.load(target + i)
    at_target = _expm1(tl.load(logprob + i))  # −(1 − p) without cancellation where p → 1
    if h is not None:
        row_h, row_entropy = tl.load(h + i), tl.load(entropy + i)
    if KIND is not None:
        other = tl.load(partner + i)
        paired = other >= 0
        other = tl.where(paired, other, i)
        other_row, other_lse = z + other * z_stride, tl.load(lse + other)
        row_own = tl.where(paired, tl.load(own + i), 0.0)
        row_cross = tl.where(paired, tl.load(cross + i), 0.0)
        row_divergence = tl.load(divergence + i)

    WHOLE: tl.constexpr = VOCAB // (DEPTH * LANES) * (DEPTH * LANES)
    for TAIL in tl.static_range(2):
        for start in range(WHOLE if TAIL else 0, VOCAB if TAIL else WHOLE, DEPTH * LANES):
            columns = _columns(start)
            inside = columns < VOCAB if TAIL else None
            x = tl.load(row + columns, mask=inside)
            if KIND is None:
                # `out` may alias z. In 2-byte types, tile k then overwrites logits of tile ⌊k/2⌋, some of which belong
                # to other threads and, in tile 0, may be unread. A barrier between the reads and the writes of a tile
                # ensures that every thread has read the logits that are overwritten.
                tl.debug_barrier()
            log_p = x - row_lse
            p = tl.exp(log_p)
            dz = -row_g * tl.where(columns == row_target, at_target, p)
            if h is not None:
                dz -= row_h * p * (log_p + row_entropy)
            if KIND is not None:
                log_q = tl.load(other_row + columns, mask=inside) - other_lse
                dz += row_own * p * (_log_ratio(log_p, log_q, KIND) - row_divergence)
                dz += row_cross * (p - tl.exp(log_q))
            if SOFTCAP is not None:
                tanh = x * (t / SOFTCAP)
                dz *= 1.0 - tanh * tanh
            tl.store(place + columns, dz * inverse, mask=inside)


def _launch(kernel: Any, rows: int, *args: Any) -> None:
    if rows:
        with torch.cuda.device_of(args[0]):
            kernel[(rows,)](*args, num_warps=NUM_WARPS)


def forward(
    z: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    softcap: float | None,
) -> RowStats:
    """As `softmax_torch.forward`; bias and statistics are fp32."""
    n, vocab = z.shape
    stats = RowStats(*(z.new_empty(n) for _ in range(3)))
    _launch(_forward_kernel, n, z, target, bias, temperature, *stats, z.stride(0), vocab, softcap or None)
    return stats


def divergence(z: torch.Tensor, lse: torch.Tensor, partner: torch.Tensor, kind: str) -> torch.Tensor:
    """As `softmax_torch.divergence`; [n] fp32."""
    n, vocab = z.shape
    result = z.new_empty(n)
    _launch(_divergence_kernel, n, z, lse, partner, result, z.stride(0), vocab, kind)
    return result


def backward(
    z: torch.Tensor,
    out: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor,
    softcap: float | None,
    stats: RowStats,
    g: torch.Tensor,
    h: torch.Tensor | None,
    pairing: Pairing | None = None,
) -> None:
    """As `softmax_torch.backward`; `out` fp32, bf16 or fp16 with unit column stride.

    Without a pairing and with a `source` from `compaction_index`, `out` may be z, or start each row where z does:
    z.view(torch.bfloat16)[:, :V], which has twice the row stride.
    """
    kind, *pairs = pairing or (None, None, None, None, None)
    _launch(
        _backward_kernel, len(source),
        z, out, source, target, temperature, stats.logprob, stats.lse, stats.entropy, g, h, *pairs,
        z.stride(0), out.stride(0), z.shape[1], softcap or None, kind,
    )  # fmt: skip


def specialisations() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """(kernel, signature, constexprs, num_warps) for triton.compile, for every variant that tests compile."""
    types = dict.fromkeys(("source", "target", "partner"), "*i64")
    types |= dict.fromkeys(("z_stride", "out_stride"), "i32")

    def variant(kernel: Any, out: str = "*fp32", **constexprs: Any) -> tuple[Any, dict[str, str], dict[str, Any], int]:
        constexprs["VOCAB"] = 151_936
        known = {**types, "out": out, **dict.fromkeys(constexprs, "constexpr")}
        return kernel, {name: known.get(name, "*fp32") for name in kernel.arg_names}, constexprs, NUM_WARPS

    unpaired = dict.fromkeys(("partner", "divergence", "own", "cross", "KIND"))
    for kind in (KL, JSD):
        yield variant(_divergence_kernel, KIND=kind)
        yield variant(_backward_kernel, "*bf16", SOFTCAP=30.0, KIND=kind)
    yield variant(_forward_kernel, bias=None, SOFTCAP=None)
    yield variant(_forward_kernel, bias=None, SOFTCAP=30.0)
    yield variant(_forward_kernel, SOFTCAP=None)
    for out in ("*fp32", "*bf16", "*fp16"):
        yield variant(_backward_kernel, out, h=None, SOFTCAP=None, **unpaired)
        yield variant(_backward_kernel, out, SOFTCAP=30.0, **unpaired)
