"""A chunk of rows kept as exp(z − panel maximum) in bf16 (csrc/softmax_bf16.cpp).

This takes half the memory of fp32 logits and no separate softmax passes: the GEMM for the logits writes it, and the GEMMs
of the backward pass read dz from it. It suffices for losses that need log-probs, entropies and dL/dlogprob only.
"""

from __future__ import annotations

import torch

from pact_fast.kernels.head.gemm import CpuBf16Gemms
from pact_fast.kernels.head.logits import rows_of
from pact_fast.kernels.head.softmax_torch import Pairing, RowStats
from pact_fast.kernels.runtime.scratch import Scratch, padded_nbytes

ROWS = 512  # per chunk with gradients; more are slightly faster and take more memory
ROWS_FORWARD = 1024  # per chunk without gradients, when exp(z − max) is not kept
PANEL = 64  # columns per panel, which share a maximum


class Bf16SoftmaxChunk:
    """Forward and backward of one chunk at a time, with the interface of `Logits`, without pairs and entropy gradients.

    Args:
        gemms: The bf16 GEMMs.
        rows: Most rows of a chunk.
        grads: Whether (hidden, weight, bias) need a gradient; a bias is not supported.
    """

    def __init__(self, gemms: CpuBf16Gemms, rows: int, grads: tuple[bool, bool, bool]):
        self._gemms, self._x_grad = gemms, grads[0]
        self._panels, self._keep = -(-len(gemms.weight) // PANEL), any(grads)
        exp_z, panel_max = (self._panels * rows * PANEL,), (self._panels * rows,)
        kept = padded_nbytes(exp_z, torch.bfloat16) + padded_nbytes(panel_max, torch.float32) if self._keep else 0
        scratch = Scratch(kept + gemms.scratch, gemms.weight.device)
        gemms.bind_scratch(scratch)
        if self._keep:
            self._exp_z, self._panel_max = scratch.empty(exp_z, torch.bfloat16), scratch.empty(panel_max, torch.float32)
        self._scratch = scratch  # owns the buffers; released with this object

    def forward(self, x: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> RowStats:
        self._x, self._rows = x.contiguous(), (target, temperature)
        self._stats = RowStats(*(temperature.new_empty(len(x)) for _ in range(3)))
        kept = self._exp_and_max() if self._keep else (None, None)
        torch.ops.pact_fast.bf16_softmax(self._x, self._gemms.weight, *self._rows, *kept, *self._stats)
        return self._stats

    def backward(
        self, source: torch.Tensor, g: torch.Tensor, h: torch.Tensor | None, pairing: Pairing | None
    ) -> torch.Tensor | None:
        assert h is None and pairing is None
        x, weight = rows_of(self._x, source), self._gemms.weight
        dx, *accumulators = self._gemms.grad_outputs(x, self._x_grad)
        logprob, lse, _ = self._stats
        torch.ops.pact_fast.bf16_softmax_grads(
            *self._exp_and_max(), source, *self._rows, logprob, lse, g, x, weight, dx, *accumulators
        )  # fmt: skip
        return dx

    def _exp_and_max(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(exp_z [panels, n, 64], panel_max [panels, n]) of the n rows of this chunk."""
        shape = self._panels, len(self._x)
        entries = shape[0] * shape[1]
        return self._exp_z[: entries * PANEL].view(*shape, PANEL), self._panel_max[:entries].view(shape)

    def weight_grads(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self._gemms.weight_grad(), None
