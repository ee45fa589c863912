"""A chunk of rows kept as logits in the accumulation dtype, from which every loss term can be computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pact_fast.kernels.head.gemm import HeadGemms
from pact_fast.kernels.head.row_statistics import row_statistics
from pact_fast.kernels.head.softmax_torch import Pairing, RowStats
from pact_fast.kernels.runtime.backends import softmax_module
from pact_fast.kernels.runtime.scratch import Scratch, padded_nbytes

ROW_ALIGNMENT = 16  # on CUDA, rows start at multiples of this many logits, so that 16-byte accesses are possible


class Logits:
    """Forward and backward of one chunk at a time: a GEMM, a softmax pass; then a softmax pass to dz, two GEMMs.

    Args:
        backend: Whose softmax passes run.
        gemms: The GEMMs of the head.
        bias: [V] in the accumulation dtype, or None.
        softcap: None: no cap.
        rows: Most rows of a chunk.
        dtype: The accumulation dtype.
        buffers: 2 if rows are paired, else 1: dz then overwrites the logits.
        grads: Whether (hidden, weight, bias) need a gradient.
        statistics: Names of `row_statistics` that every forward computes.
    """

    def __init__(
        self,
        backend: str,
        gemms: HeadGemms,
        bias: torch.Tensor | None,
        softcap: float | None,
        rows: int,
        dtype: torch.dtype,
        buffers: int,
        grads: tuple[bool, bool, bool],
        statistics: Sequence[str] = (),
    ):
        weight = gemms.weight
        self._statistics, self.row_statistics = statistics, gemms.weight.new_zeros(0, dtype=dtype)
        self._softmax, self._gemms = softmax_module(backend), gemms
        self._bias, self._softcap = bias, softcap
        self._x_grad = grads[0]
        self._d_bias = weight.new_zeros(len(weight), dtype=dtype) if grads[2] else None
        padded = -(-len(weight) // ROW_ALIGNMENT) * ROW_ALIGNMENT
        shape = rows, padded if weight.is_cuda else len(weight)
        scratch = Scratch(buffers * padded_nbytes(shape, dtype) + gemms.scratch, weight.device)
        gemms.bind_scratch(scratch)
        self._buffers = [scratch.empty(shape, dtype)[:, : len(weight)] for _ in range(buffers)]
        self._scratch = scratch  # owns the buffers; released with this object

    def forward(self, x: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> RowStats:
        """Statistics [n] of rows x [n, D]."""
        self._x, self._target, self._temperature = x, target, temperature
        z = self._buffers[0][: len(x)]
        self._gemms.logits(x, z)
        self._stats = self._softmax.forward(z, target, self._bias, temperature, self._softcap)
        if self._statistics:
            self.row_statistics = row_statistics(self._statistics, z, target, self._stats)
        return self._stats

    def divergence(self, partner: torch.Tensor, kind: str) -> torch.Tensor:
        """[n] divergence of each row from its partner, see `softmax_torch.divergence`."""
        return self._softmax.divergence(self._buffers[0][: len(partner)], self._stats.lse, partner, kind)

    def backward(
        self, source: torch.Tensor, g: torch.Tensor, h: torch.Tensor | None, pairing: Pairing | None
    ) -> torch.Tensor | None:
        """dx [m, D] of the rows `source` [m], None if not needed. Their dz is written to the front of the last buffer."""
        z, scale = self._buffers[0][: len(g)], self._gemms.scale(g)
        if scale != 1.0:
            g, h = g * scale, None if h is None else h * scale
            pairing = pairing and pairing._replace(own=pairing.own * scale, cross=pairing.cross * scale)
        out = self._gemms.dz_view(self._buffers[-1][: len(g)])
        self._softmax.backward(
            z, out, source, self._target, self._temperature, self._softcap, self._stats, g, h, pairing
        )
        dz = out[: len(source)]
        if self._d_bias is not None:
            self._d_bias.add_(dz.sum(0, dtype=self._d_bias.dtype), alpha=1.0 / scale)
        return self._gemms.backward(dz, rows_of(self._x, source), scale, self._x_grad)

    def weight_grads(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(dL/dW, dL/db) of all chunks so far; None where not needed."""
        return self._gemms.weight_grad(), self._d_bias


def rows_of(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """x[source] for a `source` from `compaction_index`; x itself, not a copy, if all rows are active."""
    return x if len(source) == len(x) else x[source]
