"""A chunk of rows of the head as the terms of its softmax in bf16 (csrc/softmax_bf16.cpp).

They take half the memory of logits in fp32 and no row pass: the products make them, and read dz from them. But nothing can
be had from them besides log-probs, entropies and the gradient of the former.
"""

from __future__ import annotations

import torch

from pact_fast.kernels.head.gemm import CpuBf16Gemms
from pact_fast.kernels.head.logits import rows_of
from pact_fast.kernels.head.softmax_torch import Pairing, RowStats
from pact_fast.kernels.runtime.scratch import Scratch, padded_nbytes

ROWS = 512  # at a time, if there will be gradients: more are a little faster and take more memory
ROWS_FORWARD = 1024  # at a time otherwise, when no terms are kept
PANEL = 64  # columns that share a maximum


class Bf16SoftmaxChunk:
    """At most `rows` rows at a time; the same as Logits, for what it serves."""

    def __init__(self, products: CpuBf16Gemms, rows: int, grads: tuple[bool, bool, bool]):
        self._products, self._x_grad = products, grads[0]
        self._panels, self._keep = -(-len(products.weight) // PANEL), any(grads)
        exp_z, panel_max = (self._panels * rows * PANEL,), (self._panels * rows,)
        kept = padded_nbytes(exp_z, torch.bfloat16) + padded_nbytes(panel_max, torch.float32) if self._keep else 0
        scratch = Scratch(kept + products.scratch, products.weight.device)
        products.take(scratch)
        if self._keep:
            self._exp_z, self._panel_max = scratch.empty(exp_z, torch.bfloat16), scratch.empty(panel_max, torch.float32)
        self._scratch = scratch  # given back when this pass is over

    def forward(self, x: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> RowStats:
        self._x, self._rows = x.contiguous(), (target, temperature)
        self._stats = RowStats(*(temperature.new_empty(len(x)) for _ in range(3)))
        terms = self._chunk() if self._keep else (None, None)
        torch.ops.pact_fast.bf16_softmax(self._x, self._products.weight, *self._rows, *terms, *self._stats)
        return self._stats

    def backward(
        self, source: torch.Tensor, g: torch.Tensor, h: torch.Tensor | None, pairing: Pairing | None
    ) -> torch.Tensor | None:
        assert h is None and pairing is None
        x, weight = rows_of(self._x, source), self._products.weight
        dx, *sums = self._products.results(x, self._x_grad)
        logprob, lse, _ = self._stats
        torch.ops.pact_fast.bf16_softmax_grads(
            *self._chunk(), source, *self._rows, logprob, lse, g, x, weight, dx, *sums
        )  # fmt: skip
        return dx

    def _chunk(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(exp_z [panels, n, 64], panel_max [panels, n]) of the n rows of this chunk."""
        shape = self._panels, len(self._x)
        entries = shape[0] * shape[1]
        return self._exp_z[: entries * PANEL].view(*shape, PANEL), self._panel_max[:entries].view(shape)

    def weight_grads(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self._products.weight_grad(), None
