"""Log-probs whose gradients have been formed with the logits, for one loss and its multiples."""

from __future__ import annotations

from typing import Any

import torch

from pact_fast.errors import PactError

TOLERANCE = 1e-6  # relative to the largest derivative


class OneGradient(torch.autograd.Function):
    """Log-probs and entropies [N] whose gradients have been formed for derivatives g, h: others must be a multiple of them.

    total: a scalar whose gradient is Σ g·dlogprob + Σ h·dentropy.
    """

    @staticmethod
    def forward(
        ctx: Any, total: torch.Tensor, logprob: torch.Tensor, entropy: torch.Tensor, g: torch.Tensor, h: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(g, h)
        return logprob.clone(), entropy.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        formed, asked = torch.cat(ctx.saved_tensors).double(), torch.cat(upstream).double()
        scale = (formed @ asked) / (formed @ formed).clamp(min=torch.finfo(torch.float64).tiny)
        if not differ(formed * scale, asked):
            return scale.to(upstream[0].dtype), None, None, None, None
        raise PactError('the loss is not the one whose gradients were formed; install the adapter with mode="head"')


def differ(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether derivatives differ by more than rounding."""
    if not len(theirs):
        return False
    return not bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())
