"""The loss of a token as TRL and Liger define it, for `pact_loss(policy_loss=…)`: GRPO's family, CISPO, SAPO, with KL."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pact_fast.kernels.token_losses import TokenLoss


class GrpoSettings(NamedTuple):
    """Settings under TRL's names; `loss_type`: cispo, sapo, or any other for the clipped ratio."""

    loss_type: str
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05


def grpo_loss(
    settings: GrpoSettings,
    advantage: torch.Tensor,
    old: torch.Tensor | None,
    ref: torch.Tensor | None,
    importance: torch.Tensor | None,
) -> TokenLoss:
    """Columns [N] → loss [n]; `old` None: the current policy. `importance` multiplies the policy term alone."""
    s = settings

    def loss(logprob: torch.Tensor, entropy: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        a = advantage[index]
        ratio = (logprob - (logprob.detach() if old is None else old[index])).exp()
        if s.loss_type == "cispo":
            value = -ratio.clamp(max=s.epsilon_high).detach() * a * logprob
        elif s.loss_type == "sapo":
            tau = torch.where(a > 0, s.sapo_temperature_pos, s.sapo_temperature_neg)
            value = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * a
        else:
            bounded = ratio if s.delta is None else ratio.clamp(max=s.delta)
            value = -torch.minimum(bounded * a, ratio.clamp(1 - s.epsilon_low, 1 + s.epsilon_high) * a)
        if importance is not None:
            value = value * importance[index]
        if s.beta:
            d = (logprob.detach() if ref is None else ref[index]) - logprob
            value = value + s.beta * (torch.expm1(d) - d) * (ratio if s.use_bias_correction_kl else 1.0)
        return value

    return loss


def metrics(
    settings: GrpoSettings,
    ratio: torch.Tensor,
    advantage: torch.Tensor,
    ref: torch.Tensor | None,
    logprob: torch.Tensor,
) -> list[torch.Tensor]:
    """Liger's metrics of tokens [N]: the mean KL if there is a beta, and the fraction that is clipped."""
    s = settings
    low, high = (-1.0, s.epsilon_high) if s.loss_type == "cispo" else (1 - s.epsilon_low, 1 + s.epsilon_high)
    clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    d = (logprob if ref is None else ref) - logprob
    kl = (torch.expm1(d) - d) * (ratio if s.use_bias_correction_kl else 1.0)
    values = ([kl] if s.beta else []) + [clipped & (s.loss_type != "sapo")]
    return [value.double().sum() / max(len(logprob), 1) for value in values]
