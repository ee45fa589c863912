"""The language-model head on a few rows at a time, so that logits of all rows never exist together.

A chunk costs one product that makes the logits and, for its active rows alone, two products with dz, their gradient:
(2 + 4f)·n·D·V multiply-adds for the active fraction f. Between forward and backward a chunk is kept as `Logits`, or as
`Bf16SoftmaxChunk` where that suffices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pact_fast.kernels.head import softmax_bf16
from pact_fast.kernels.head.gemm import CpuBf16Gemms, accumulation_dtype, products
from pact_fast.kernels.head.logits import Logits
from pact_fast.kernels.head.softmax_torch import Pairing, RowStats, compact
from pact_fast.kernels.runtime.backends import resolve

LOGITS_BUDGET = 1 << 30  # bytes of all [rows, V] buffers together
CACHED_LOGITS = 4 << 20  # bytes of one buffer; on CPU, chunks beyond the cache only cost bandwidth
WHOLE_ROWS = 32  # what the matrix products work on together
EFFICIENT_ROWS = 384  # on CPU, fewer rows than this make the matrix products slow


def chunk_rows(vocab: int, row_bytes: int, device: torch.device) -> int:
    """Rows per chunk, an even number. `row_bytes`: what one row takes in all [rows, V] buffers."""
    rows = LOGITS_BUDGET // row_bytes
    if device.type == "cpu":
        rows = min(rows, max(EFFICIENT_ROWS, CACHED_LOGITS // (4 * vocab)))
    return max(2, rows // 2 * 2)  # a pair of coupled rows is never torn apart


def balanced(total: int, most: int) -> int:
    """Rows per chunk, at most `most`, so that `total` rows make about equal chunks: a small last one would be slow."""
    if total <= most:
        return max(total, 1)
    rows = -(-total // -(-total // most))
    whole = -(-rows // WHOLE_ROWS) * WHOLE_ROWS
    return whole if whole <= most else rows + rows % 2  # even, as `most` is: pairs stay together


class ChunkedHead:
    """Statistics and gradients of one chunk of rows after another.

    hidden [T, D], weight [V, D], bias [V] or None; `total` rows will be asked for. z = softcap·tanh((xWᵀ + b)/softcap)/T.
    `grads` says which of (hidden, W, b) need a gradient. From dL/dlogprob and dL/dentropy, dL/dx comes back per chunk;
    dL/dW and dL/db add up in fp32 until `weight_grads`. `paired`: rows will be coupled (see Pairing); `entropy_grad`: there
    will be a dL/dentropy.
    """

    def __init__(
        self,
        backend: str,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        total: int,
        grads: tuple[bool, bool, bool] = (False, False, False),
        paired: bool = False,
        entropy_grad: bool = False,
    ):
        dtype, vocab = accumulation_dtype(hidden, weight), weight.shape[0]
        backend = resolve(backend, hidden.device, torch.promote_types(hidden.dtype, weight.dtype))
        made = products(backend, hidden, weight, grads[1])
        self._operand, self._dtype, self._total = made.operand, dtype, total
        self._chunk: Logits | softmax_bf16.Bf16SoftmaxChunk
        if isinstance(made, CpuBf16Gemms) and bias is None and not (softcap or paired or entropy_grad):
            self._rows = balanced(total, softmax_bf16.ROWS if any(grads) else softmax_bf16.ROWS_FORWARD)
            self._chunk = softmax_bf16.Bf16SoftmaxChunk(made, self._rows, grads)
            return
        buffers = 2 if paired else 1
        held = buffers + (4 if backend == "torch" else 0)  # plain torch needs room for its intermediate results
        self._rows = balanced(total, chunk_rows(vocab, held * vocab * dtype.itemsize, hidden.device))
        bias = None if bias is None else bias.detach().to(dtype).contiguous()
        self._chunk = Logits(backend, made, bias, softcap, self._rows, dtype, buffers, grads)

    def chunks(self) -> Iterator[slice]:
        """The rows in order; one empty chunk when there are none."""
        starts = range(0, max(self._total, 1), self._rows)
        return (slice(start, min(start + self._rows, self._total)) for start in starts)

    def forward(self, x: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> RowStats:
        """Statistics [n] of rows x [n, D]; target [n] int64, temperature [n]."""
        # row passes read [n] tensors entry after entry, and a gradient like that of a sum is one expanded number
        temperature = temperature.to(self._dtype).contiguous()
        return self._chunk.forward(x.to(self._operand), target.contiguous(), temperature)

    def divergence(self, partner: torch.Tensor, kind: str) -> torch.Tensor:
        """[n] divergences to each row's partner in the chunk (−1: none, 0); after `forward`, before `backward`."""
        assert isinstance(self._chunk, Logits)
        return self._chunk.divergence(partner, kind)

    def backward(
        self, g: torch.Tensor, h: torch.Tensor | None = None, pairing: Pairing | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """After `forward` of the same chunk: g, h [n] = dL/dlogprob, dL/dentropy (h None: 0).

        Returns (source, dx): the places [m] within the chunk whose gradient is not zero, in the order of dx [m, D] =
        dL/dx, which is None when not needed. The other places cost no matrix product.
        """
        coefficients = [g] + ([] if h is None else [h]) + ([] if pairing is None else [pairing.own, pairing.cross])
        source = compact(torch.stack(coefficients).ne(0).any(0))
        if not len(source):
            return source, None
        return source, self._chunk.backward(source, g.contiguous(), None if h is None else h.contiguous(), pairing)

    def weight_grads(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(dL/dW, dL/db) in the accumulation dtype, or rounded already to that of the parameter."""
        return self._chunk.weight_grads()
