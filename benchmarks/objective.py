"""The policy loss that competing implementations without one of their own are given."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
CLIP = 0.2


def clipped_loss(logprob: Tensor, old: Tensor | None, advantage: Any, rl_weight: Any, sft_weight: Any = None) -> Tensor:
    """PPO's clipped loss (Schulman et al. 2017, equation 7) plus weighted negative log-likelihood, summed.

    −Σ rl_weight·min(ρ·A, clip(ρ, 1 − CLIP, 1 + CLIP)·A) + sft_weight·log π, with ρ = exp(logprob − old).

    Args:
        logprob: Log-probs of the current policy, any shape.
        old: Log-probs of the policy that sampled the tokens; None: the current one, detached (ρ = 1).
        advantage: Broadcast to `logprob`.
        rl_weight: Weight of the policy loss, broadcast to `logprob`.
        sft_weight: Weight of −log π, broadcast to `logprob`; None: no such term.
    """
    ratio = (logprob - (logprob.detach() if old is None else old)).exp()
    gain = rl_weight * torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return -(gain if sft_weight is None else gain + sft_weight * logprob).sum()
