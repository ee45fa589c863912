"""Score rules of attention layers beyond softmax(scale · q kᵀ + tree mask) v: windows, soft caps, sinks."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ScoreRule(NamedTuple):
    """Scale, window and soft cap of a layer's attention scores. Layers may differ.

    scale    factor of q kᵀ, usually D^-0.5
    window   a row sees keys at most window − 1 positions before its own, along its path; None: all of them
    softcap  scores s become softcap · tanh(s / softcap); None: unchanged
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class SlidingWindow(NamedTuple):
    """Placeholder for the attention mask of layers with a window. The mask itself follows from the TreeLayout."""

    size: int


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [1, H, T, D], log-sum-exp [1, H, T]) of a softmax that has the sinks [H] among its scores, too.

    A sink has no value, so it only enlarges the denominator. A backward pass that is given both results computes
    dQ, dK and dV of that softmax.
    """
    sink = sinks.to(lse.dtype)[None, :, None]
    total = torch.logaddexp(lse, sink)
    return (out.to(lse.dtype) * (lse - total).exp()[..., None]).to(out.dtype), total


def sink_gradient(grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """d sinks [H] from out [1, H, T, D], its gradient, and the log-sum-exp [1, H, T] that includes the sinks.

    A sink is a score whose value is 0: its gradient is the sum over rows of p·(0 − Σ dO∘O).
    """
    dtype = lse.dtype
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    probability = (sinks.to(dtype)[None, :, None] - lse).exp()
    return -(probability * delta).sum((0, 2)).to(sinks.dtype)
