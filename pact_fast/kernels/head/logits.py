"""A chunk of rows of the head as logits in the accumulation dtype: whatever is asked of their softmax can be had from them."""

from __future__ import annotations

import torch

from pact_fast.kernels.head.gemm import HeadGemms
from pact_fast.kernels.head.softmax_torch import Pairing, RowStats
from pact_fast.kernels.runtime.backends import row_pass
from pact_fast.kernels.runtime.scratch import Scratch, padded_nbytes

ALIGNED = 16  # logits; on CUDA, rows begin at multiples of this, or 16-byte accesses fall apart


class Logits:
    """At most `rows` rows at a time. One product makes the logits, a row pass reads them, and one turns them into dz.

    `buffers`: 2 if rows will be coupled, else 1, where dz takes the place of the logits.
    """

    def __init__(
        self,
        backend: str,
        products: HeadGemms,
        bias: torch.Tensor | None,
        softcap: float | None,
        rows: int,
        dtype: torch.dtype,
        buffers: int,
        grads: tuple[bool, bool, bool],
    ):
        weight = products.weight
        self._pass, self._products = row_pass(backend), products
        self._bias, self._softcap = bias, softcap
        self._x_grad = grads[0]
        self._d_bias = weight.new_zeros(len(weight), dtype=dtype) if grads[2] else None
        padded = -(-len(weight) // ALIGNED) * ALIGNED
        shape = rows, padded if weight.is_cuda else len(weight)
        scratch = Scratch(buffers * padded_nbytes(shape, dtype) + products.scratch, weight.device)
        products.take(scratch)
        self._buffers = [scratch.empty(shape, dtype)[:, : len(weight)] for _ in range(buffers)]
        self._scratch = scratch  # given back when this pass is over

    def forward(self, x: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> RowStats:
        self._x, self._target, self._temperature = x, target, temperature
        z = self._buffers[0][: len(x)]
        self._products.logits(x, z)
        self._stats = self._pass.forward(z, target, self._bias, temperature, self._softcap)
        return self._stats

    def divergence(self, partner: torch.Tensor, kind: str) -> torch.Tensor:
        return self._pass.divergence(self._buffers[0][: len(partner)], self._stats.lse, partner, kind)

    def backward(
        self, source: torch.Tensor, g: torch.Tensor, h: torch.Tensor | None, pairing: Pairing | None
    ) -> torch.Tensor | None:
        """dz of the rows `source` lies in front of the last buffer from here on; returns dx of these rows, if wanted."""
        z, scale = self._buffers[0][: len(g)], self._products.scale(g)
        if scale != 1.0:
            g, h = g * scale, None if h is None else h * scale
            pairing = pairing and pairing._replace(own=pairing.own * scale, cross=pairing.cross * scale)
        out = self._products.dz_view(self._buffers[-1][: len(g)])
        self._pass.backward(z, out, source, self._target, self._temperature, self._softcap, self._stats, g, h, pairing)
        dz = out[: len(source)]
        if self._d_bias is not None:
            self._d_bias.add_(dz.sum(0, dtype=self._d_bias.dtype), alpha=1.0 / scale)
        return self._products.backward(dz, rows_of(self._x, source), scale, self._x_grad)

    def weight_grads(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self._products.weight_grad(), self._d_bias


def rows_of(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """x[source], for a `source` of rows_torch.compact: if it is all rows, each stays where it is."""
    return x if len(source) == len(x) else x[source]
