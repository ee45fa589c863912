"""Softmax passes of the head in C++ (csrc/softmax_fp32.cpp), fp32 on CPU; the functions of softmax_torch.py.

The library must be loaded first (`build.status()`).
"""

from __future__ import annotations

import torch

from pact_fast.kernels.head.softmax_torch import JSD, Pairing, RowStats


def forward(
    z: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    softcap: float | None,
) -> RowStats:
    """As `softmax_torch.forward`."""
    logprob, lse, entropy = (torch.empty(len(z), dtype=torch.float32) for _ in range(3))
    torch.ops.pact_fast.head_softmax_forward(z, target, bias, temperature, softcap or 0.0, logprob, lse, entropy)
    return RowStats(logprob, lse, entropy)


def divergence(z: torch.Tensor, lse: torch.Tensor, partner: torch.Tensor, kind: str) -> torch.Tensor:
    """As `softmax_torch.divergence`."""
    result = torch.empty(len(z), dtype=torch.float32)
    torch.ops.pact_fast.head_softmax_divergence(z, lse, partner, kind == JSD, result)
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
    """As `softmax_torch.backward`."""
    pairs = (None, None, None, None, False)
    if pairing is not None:
        pairs = (pairing.partner, pairing.divergence, pairing.own, pairing.cross, pairing.kind == JSD)  # type: ignore[assignment]
    torch.ops.pact_fast.head_softmax_backward(z, out, source, target, temperature, softcap or 0.0, *stats, g, h, *pairs)
