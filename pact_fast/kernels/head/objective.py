"""Clip rules of the policy loss, k3 and importance weights: small pure functions on [N] tensors.

Every rule gives, per token, the loss and its derivative by the token's log-prob, so that gradients can be formed in the
pass that makes the logits. `log_ratio` is log π − log π_old; formulas: method, section 2, and docs/loss.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pact_fast.kernels.head.tokens import LossTokens

Clip = tuple[float | None, float | None]


class PolicyTerm(NamedTuple):
    """All [N]: value, d value / d logprob, and where the bounds cut (bool)."""

    value: torch.Tensor
    slope: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def ppo(log_ratio: torch.Tensor, advantage: torch.Tensor, clip: Clip, delta: float | None = None) -> PolicyTerm:
    """−min(min(r, delta)·A, clip(r, 1−low, 1+high)·A).

    `delta` > 1 + high bounds the ratio of negative advantages (dual clip). A token is counted as clipped where a bound
    takes its gradient away.
    """
    low, high = bounds(clip)
    ratio = log_ratio.exp()
    clipped_low = (ratio < low) & (advantage < 0)
    clipped_high = (ratio > high) & (advantage > 0)
    if delta is not None:
        clipped_high = clipped_high | ((ratio > delta) & (advantage < 0))
    used = ratio if delta is None else ratio.clamp(max=delta)
    value = -torch.minimum(used * advantage, ratio.clamp(low, high) * advantage)
    slope = torch.where(clipped_low | clipped_high, 0.0, -ratio * advantage)
    return PolicyTerm(value, slope, clipped_low, clipped_high)


def cispo(log_ratio: torch.Tensor, advantage: torch.Tensor, logprob: torch.Tensor, clip: Clip) -> PolicyTerm:
    """−sg(clip(r, 1−low, 1+high))·A·log π: every token keeps a gradient, the bounds cap its weight."""
    low, high = bounds(clip)
    ratio = log_ratio.exp()
    weight = ratio.clamp(low, high)
    slope = -weight * advantage
    return PolicyTerm(slope * logprob, slope, ratio < low, ratio > high)


def bounds(clip: Clip) -> tuple[float, float]:
    """(1 − low, 1 + high); None leaves a side open."""
    low, high = clip
    return (0.0 if low is None else 1.0 - low), (float("inf") if high is None else 1.0 + high)


def sequence_mean(log_ratio: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Mean of log_ratio [N] over each group (int64 ids [N]), given back to its tokens.

    exp of it is gspo's sequence ratio: the geometric mean of the token ratios.
    """
    _, inverse, count = group.unique(return_inverse=True, return_counts=True)
    total = log_ratio.new_zeros(len(count)).index_add_(0, inverse, log_ratio)
    return (total / count)[inverse]


def k3(reference: torch.Tensor, logprob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(d) − d − 1 with d = log π_ref − log π, and its derivative by log π. Both are 0 where the reference is NaN."""
    d = torch.where(reference.isnan(), 0.0, reference - logprob)
    grown = torch.expm1(d)
    return grown - d, -grown


def importance_weight(old: torch.Tensor, sampler: torch.Tensor, cap: torch.Tensor) -> torch.Tensor:
    """min(cap, exp(old − sampler)), all [N]; 1 where the sampler's log-prob or the cap is NaN."""
    weight = torch.minimum((old - sampler).exp(), cap)
    return torch.where(sampler.isnan() | cap.isnan(), 1.0, weight)


class Settings(NamedTuple):
    policy_loss: str
    clip: Clip
    delta: float | None
    kl_coef: float
    entropy_coef: float
    is_cap: Sequence[float] | None  # by context
    softcap: float | None


class TokenTerms(NamedTuple):
    """Everything about a chunk of tokens that follows from its log-probs and entropies; [n] each.

    g and h are dL/dlogprob and dL/dentropy.
    """

    rl: torch.Tensor
    sft: torch.Tensor
    g: torch.Tensor
    h: torch.Tensor
    k3: torch.Tensor
    log_ratio: torch.Tensor
    clip_log: torch.Tensor
    weight: torch.Tensor
    old: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def token_terms(
    tokens: LossTokens, logprob: torch.Tensor, entropy: torch.Tensor, settings: Settings, clip_log: torch.Tensor | None
) -> TokenTerms:
    """The loss of every token and its derivatives. `clip_log` [n]: gspo's sequence log-ratios; None: the tokens'."""
    dtype = logprob.dtype
    rl_weight, sft_weight, advantage = (t.to(dtype) for t in (tokens.rl_weight, tokens.sft_weight, tokens.advantage))
    old = old_logprob_of(tokens, logprob)
    log_ratio = logprob - old
    if clip_log is None:
        clip_log = log_ratio
    # an advantage of 0 makes the term 0 even where the ratio overflows
    rule_log = torch.where(advantage == 0, 0.0, clip_log)
    if settings.policy_loss == "cispo":
        term = cispo(rule_log, advantage, logprob, settings.clip)
    else:
        term = ppo(rule_log, advantage, settings.clip, settings.delta)
    weight = torch.ones_like(logprob)
    if settings.is_cap is not None and tokens.sampler_logprob is not None:
        caps = torch.tensor(settings.is_cap, dtype=dtype, device=old.device)[tokens.context]
        weight = importance_weight(old, tokens.sampler_logprob.to(dtype), caps)
    reference = torch.full_like(logprob, torch.nan) if tokens.ref_logprob is None else tokens.ref_logprob.to(dtype)
    kl, kl_slope = k3(reference, logprob)
    live = rl_weight != 0
    value = weight * term.value + settings.kl_coef * kl - settings.entropy_coef * entropy
    slope = weight * term.slope + settings.kl_coef * kl_slope
    # where, not a product: 0 · inf is NaN
    rl = torch.where(live, rl_weight * value, 0.0)
    g = torch.where(live, rl_weight * slope, 0.0) - sft_weight
    return TokenTerms(
        rl=rl,
        sft=torch.where(sft_weight != 0, -sft_weight * logprob, 0.0),
        g=g,
        h=-settings.entropy_coef * rl_weight,
        k3=kl,
        log_ratio=log_ratio,
        clip_log=clip_log,
        weight=weight,
        old=old,
        clipped_low=term.clipped_low,
        clipped_high=term.clipped_high,
    )


def old_logprob_of(tokens: LossTokens, logprob: torch.Tensor) -> torch.Tensor:
    """log π_old [n]; where it is NaN, the current one, which makes the ratio exactly 1."""
    return torch.where(tokens.old_logprob.isnan(), logprob, tokens.old_logprob.to(logprob.dtype))
