"""Inverse-CDF sampling from rows of log-probs, in two levels: blocks of the vocabulary, then the tokens of one block."""

from __future__ import annotations

import torch

BLOCK = 256  # tokens


def inverse_cdf(logp: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token of each row whose cumulated probability exceeds `uniform` times that of the whole row.

    Sums are in fp64, but only one block of each row is cumulated token by token: fp64 copies of a large vocabulary would
    take longer than the model. A token of probability 0 is never returned.

    Args:
        logp: Floating point [b, V]; rows need not be normalised.
        uniform: fp64 [b] in [0, 1).

    Returns:
        int64 [b].
    """
    p = logp.exp()
    if padding := -p.shape[1] % BLOCK:
        p = torch.nn.functional.pad(p, (0, padding))
    p = p.view(len(p), -1, BLOCK)
    cumulated = p.sum(-1, dtype=torch.float64).cumsum(-1)
    block, before = _search(cumulated, uniform * cumulated[:, -1])
    inside = p[torch.arange(len(p), device=p.device), block].double().cumsum(-1)
    token, _ = _search(inside, uniform * cumulated[:, -1] - before)
    return block * BLOCK + token


def _search(cumulated: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the first sum of each row above its target, and the sum before it. cumulated [b, n], target [b]."""
    below_total = torch.nextafter(cumulated[:, -1], torch.zeros_like(target))  # rounding may put the target above it
    target = torch.minimum(target, below_total)
    index = torch.searchsorted(cumulated, target[:, None], right=True).clamp_(max=cumulated.shape[1] - 1)  # NaN
    before = torch.nn.functional.pad(cumulated, (1, 0)).gather(1, index)
    return index[:, 0], before[:, 0]
