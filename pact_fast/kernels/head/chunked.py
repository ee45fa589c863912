"""The language-model head, computed in chunks of rows so that the [N, V] logits never exist as a whole.

A chunk costs one GEMM for the logits and, for its active rows (those with a gradient) only, two GEMMs with dz, the
gradient of the logits: (2 + 4f)·n·D·V FLOPs for the active fraction f. Between forward and backward a chunk is kept
as `Logits`, or as `Bf16SoftmaxChunk` where that is sufficient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pact_fast.kernels.head import softmax_bf16
from pact_fast.kernels.head.gemm import CpuBf16Gemms, accumulation_dtype, make_gemms
from pact_fast.kernels.head.logits import Logits
from pact_fast.kernels.head.softmax_torch import Pairing, RowStats, compaction_index
from pact_fast.kernels.runtime.backends import resolve

LOGITS_BUDGET = 1 << 30  # bytes of all [rows, V] buffers together
CACHED_LOGITS_BYTES = 4 << 20  # of one buffer; on CPU, chunks that exceed the cache only cost bandwidth
ROW_MULTIPLE = 32  # GEMMs are most efficient on multiples of this many rows
EFFICIENT_ROWS = 384  # on CPU, GEMMs of fewer rows are slow


def max_chunk_rows(vocab: int, row_bytes: int, device: torch.device) -> int:
    """Most rows of a chunk, an even number. `row_bytes`: bytes of one row in all [rows, V] buffers together."""
    rows = LOGITS_BUDGET // row_bytes
    if device.type == "cpu":
        rows = min(rows, max(EFFICIENT_ROWS, CACHED_LOGITS_BYTES // (4 * vocab)))
    return max(2, rows // 2 * 2)  # even: both rows of a pair are in the same chunk


def balanced_chunk_rows(total: int, max_rows: int) -> int:
    """Rows per chunk, at most `max_rows`, so that `total` rows make chunks of about equal size: small GEMMs are slow."""
    if total <= max_rows:
        return max(total, 1)
    rows = -(-total // -(-total // max_rows))
    rounded = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
    return rounded if rounded <= max_rows else rows + rows % 2  # even, as `max_rows` is: pairs stay together


class ChunkedHead:
    """Statistics and gradients of one chunk of rows at a time: `forward`, then `backward` of the same chunk.

    z = softcap·tanh((xWᵀ + b)/softcap)/T. dL/dx is returned per chunk; dL/dW and dL/db accumulate until `weight_grads`.

    Args:
        backend: "auto" or one of `backends()`.
        hidden: [T, D]; only its dtype and device are used.
        weight: [V, D].
        bias: [V] or None.
        softcap: None: no cap.
        total: Rows of all chunks together.
        grads: Whether (hidden, weight, bias) need a gradient.
        paired: Rows will be paired, see `Pairing`.
        entropy_grad: `backward` will be given dL/dentropy.
        statistics: Names of `row_statistics`, to be computed beside `RowStats`.

    Raises:
        PactError: The backend does not support these tensors.
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
        statistics: Sequence[str] = (),
    ):
        dtype, vocab = accumulation_dtype(hidden, weight), weight.shape[0]
        backend = resolve(backend, hidden.device, torch.promote_types(hidden.dtype, weight.dtype))
        gemms = make_gemms(backend, hidden, weight, grads[1])
        self._operand_dtype, self._dtype, self._total = gemms.operand_dtype, dtype, total
        self._chunk: Logits | softmax_bf16.Bf16SoftmaxChunk
        if isinstance(gemms, CpuBf16Gemms) and bias is None and not (softcap or paired or entropy_grad or statistics):
            max_rows = softmax_bf16.ROWS if any(grads) else softmax_bf16.ROWS_FORWARD
            self._rows = balanced_chunk_rows(total, max_rows)
            self._chunk = softmax_bf16.Bf16SoftmaxChunk(gemms, self._rows, grads)
            return
        buffers = 2 if paired else 1
        counted = buffers + (4 if backend == "torch" else 0)  # plain torch allocates intermediate results as well
        self._rows = balanced_chunk_rows(total, max_chunk_rows(vocab, counted * vocab * dtype.itemsize, hidden.device))
        bias = None if bias is None else bias.detach().to(dtype).contiguous()
        self._chunk = Logits(backend, gemms, bias, softcap, self._rows, dtype, buffers, grads, statistics)

    def chunks(self) -> Iterator[slice]:
        """The chunks in order; one empty chunk when there are no rows."""
        starts = range(0, max(self._total, 1), self._rows)
        return (slice(start, min(start + self._rows, self._total)) for start in starts)

    def forward(self, x: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> RowStats:
        """Statistics [n] of rows x [n, D]; target [n] int64, temperature [n]."""
        # the kernels need contiguous [n] tensors; a temperature may be an expanded scalar
        temperature = temperature.to(self._dtype).contiguous()
        return self._chunk.forward(x.to(self._operand_dtype), target.contiguous(), temperature)

    def row_statistics(self) -> torch.Tensor:
        """[len(statistics), n] of the chunk that `forward` computed last."""
        assert isinstance(self._chunk, Logits)
        return self._chunk.row_statistics

    def divergence(self, partner: torch.Tensor, kind: str) -> torch.Tensor:
        """[n] divergence of each row from its partner (int64; −1: none, gives 0); between `forward` and `backward`."""
        assert isinstance(self._chunk, Logits)
        return self._chunk.divergence(partner, kind)

    def backward(
        self, g: torch.Tensor, h: torch.Tensor | None = None, pairing: Pairing | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of the chunk that `forward` computed last.

        Args:
            g: [n] dL/dlogprob.
            h: [n] dL/dentropy; None: 0.
            pairing: Pairs of rows, or None.

        Returns:
            source: [m] int64, the active rows of the chunk. Inactive rows take part in no GEMM.
            dx: [m, D] dL/dx of these rows, in this order; None if hidden needs no gradient.
        """
        coefficients = [g] + ([] if h is None else [h]) + ([] if pairing is None else [pairing.own, pairing.cross])
        source = compaction_index(torch.stack(coefficients).ne(0).any(0))
        if not len(source):
            return source, None
        # g may be an expanded scalar, as the gradient of a sum is
        return source, self._chunk.backward(source, g.contiguous(), None if h is None else h.contiguous(), pairing)

    def weight_grads(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(dL/dW, dL/db) in the accumulation dtype, or already rounded to the parameter's dtype; None if not needed."""
        return self._chunk.weight_grads()
