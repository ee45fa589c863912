"""Losses of a token for `pact_loss(policy_loss=…, sft_loss=…)`, written as one writes them for autograd.

`phi_weighted` and `shaped` are for `sft_loss`. Each of the others takes columns [N] of the whole table and returns a
function (logprob [n], entropy [n], index [n]) → loss [n], which `pact_loss` calls for every chunk. Columns are read at
`index`; NaN stands for nothing here.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from pact_fast.kernels.head.objective import SftLoss, TokenLoss

Tensor = torch.Tensor


def ppo(advantage: Tensor, old_logprob: Tensor, low: float = 0.2, high: float = 0.2) -> TokenLoss:
    """−min(r·A, clip(r, 1 − low, 1 + high)·A), the built-in rule of the same name (arXiv 1707.06347)."""

    def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        a = advantage[index].to(logprob.dtype)
        ratio = (logprob - old_logprob[index].to(logprob.dtype)).exp()
        return -torch.minimum(ratio * a, ratio.clamp(1.0 - low, 1.0 + high) * a)

    return loss


def sapo(advantage: Tensor, old_logprob: Tensor, tau_pos: float = 1.0, tau_neg: float = 1.05) -> TokenLoss:
    """−4/τ·σ(τ·(r − 1))·A, a soft gate in place of a clip; τ by the sign of A (SAPO, arXiv 2511.20347)."""

    def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        a = advantage[index].to(logprob.dtype)
        ratio = (logprob - old_logprob[index].to(logprob.dtype)).exp()
        tau = torch.where(a > 0, tau_pos, tau_neg)
        return -torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau * a

    return loss


def dppo(
    advantage: Tensor,
    old_logprob: Tensor,
    divergence: Literal["tv", "kl"] = "tv",
    low: float = 0.2,
    high: float = 0.2,
    ratio_cap: float = 20.0,
) -> TokenLoss:
    """−A·sg(min(r, cap))·ℓ of tokens inside a trust region of probabilities; others have no gradient (arXiv 2602.04879).

    Outside is a token whose probability p has already moved from q = exp(old) in the direction of its advantage, by more
    than `high` (A > 0) or `low` (else): |p − q| for "tv", q·log(q/p) + (1 − q)·log((1 − q)/(1 − p)) for "kl".
    """

    def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        a, old = (t[index].to(logprob.dtype) for t in (advantage, old_logprob))
        now = logprob.detach()
        p, q = now.exp(), old.exp()
        if divergence == "tv":
            moved = (p - q).abs()
        else:
            other_p, other_q = (-torch.expm1(x).clamp(max=-1e-7) for x in (now, old))
            moved = q * (old - now) + other_q * (other_q.log() - other_p.log())
        outside = torch.where(a > 0, (p > q) & (moved > high), (p < q) & (moved > low))
        return torch.where(outside, 0.0, -a * (now - old).exp().clamp(max=ratio_cap)) * logprob

    return loss


def kl(ref_logprob: Tensor, estimator: Literal["k1", "k2", "k3"] = "k3", bound: float | None = None) -> TokenLoss:
    """An estimator of KL(π ‖ π_ref), with d = log π_ref − log π: k1 −d, k2 d²/2, k3 exp(d) − d − 1.

    bound: clamps the value, as verl and OpenRLHF do at 10; beyond it there is no gradient. Source: Schulman,
    "Approximating KL Divergence" (2020).
    """

    def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        d = ref_logprob[index].to(logprob.dtype) - logprob
        value = {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(d) - d}[estimator]()
        return value if bound is None else value.clamp(-bound, bound)

    return loss


def ratio_weighted(inner: TokenLoss, old_logprob: Tensor) -> TokenLoss:
    """r·inner with a ratio that is differentiated, too: an off-policy KL without bias (TRL's `use_bias_correction_kl`)."""

    def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        ratio = (logprob - old_logprob[index].to(logprob.dtype)).exp()
        return ratio * inner(logprob, entropy, index)

    return loss


def weighted_sum(*parts: tuple[float | Tensor, TokenLoss]) -> TokenLoss:
    """Σ weight·loss; a weight is a number or a column [N]."""

    def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        total = torch.zeros_like(logprob)
        for weight, part in parts:
            factor = weight[index].to(logprob.dtype) if isinstance(weight, Tensor) else weight
            total = total + factor * part(logprob, entropy, index)
        return total

    return loss


def phi_weighted(logprob: Tensor) -> Tensor:
    """−sg(p·(1 − p))·log π, an `sft_loss`: least weight on tokens that the policy is sure of, or finds impossible.

    Source: CHORD-φ, arXiv 2508.11408.
    """
    now = logprob.detach()
    return now.exp() * torch.expm1(now) * logprob


def shaped(gamma: float = 0.1) -> SftLoss:
    """−p/(p + γ), an `sft_loss`: policy shaping of an off-policy ratio p/1, steepest for improbable tokens.

    The advantage of the expert's tokens is a factor of their `sft_weight`. Source: LUFFY, arXiv 2504.14945.
    """
    offset = math.log(gamma)
    return lambda logprob: -torch.sigmoid(logprob - offset)
