"""Bounds of the probability mass that filters keep. They hold for any rounding and tie-breaking of another engine."""

from __future__ import annotations

import math

import torch

from pact_fast.config.filters import SamplingFilters


def log_kept_mass_bounds(
    logits: torch.Tensor, tokens: torch.Tensor, filters: SamplingFilters, slack: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of `pact_fast.model.filters.log_kept_mass` for an engine whose logits differ a little.

    A token within `slack` of a limit may be on either side of it. The lower bound counts the tokens that are kept in
    any case, the upper bound also those that may be kept.

    Args:
        logits: [n, V] after the temperature.
        tokens: int64 [n], sampled tokens, which are kept in any case.
        filters: What the engine applied.
        slack: Difference of log-probs, in nats.

    Returns:
        fp64 [n] and [n].
    """
    z = torch.log_softmax(logits.double(), -1)
    sure = may = torch.ones_like(z, dtype=torch.bool)
    if filters.min_p > 0.0:
        gap = z - z.amax(-1, keepdim=True) - math.log(filters.min_p)
        sure, may = gap >= slack, gap >= -slack
    if filters.top_k > 0:
        sure = sure & (_ahead(z, may.double(), -slack) < filters.top_k)
        may = may & (_ahead(z, may.double(), slack) < filters.top_k)
    if filters.top_p < 1.0:
        most = z.exp() * may / (z.exp() * sure).sum(-1, keepdim=True)  # shares of the least that can be left
        least = z.exp() * sure / (z.exp() * may).sum(-1, keepdim=True)
        sure, may = (
            sure & (_ahead(z, most, -slack) < filters.top_p - slack),
            may & (_ahead(z, least, slack) < filters.top_p + slack),
        )
    sampled = torch.zeros_like(may).scatter(-1, tokens[:, None], True)
    low, high = (z.masked_fill(~(kept | sampled), -torch.inf).logsumexp(-1) for kept in (sure, may))
    return low, high


def _ahead(z: torch.Tensor, weight: torch.Tensor, slack: float) -> torch.Tensor:
    """Weight [n, V] of the other tokens whose z exceeds a token's by more than `slack`, summed for each token."""
    order = z.sort(-1, descending=True)
    total = torch.nn.functional.pad(weight.gather(-1, order.indices).cumsum(-1), (1, 0))
    ahead = torch.searchsorted(-order.values, -(z + slack), right=slack < 0)
    return total.gather(-1, ahead) - (weight if slack < 0 else 0.0)
