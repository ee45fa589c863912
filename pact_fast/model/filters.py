"""Top-p, top-k and min-p on logits, as vLLM 0.32 computes them in PyTorch (`vllm/v1/sample`)."""

from __future__ import annotations

import torch

from pact_fast.config.filters import SamplingFilters

CANDIDATES = 256  # most likely tokens that are sorted for top-p at first
WIDENING = 16  # times as many are sorted in the rows where they do not reach p


def filtered(logits: torch.Tensor, filters: SamplingFilters) -> torch.Tensor:
    """Logits after the temperature, with −inf for the tokens that must not be sampled; at least one is left.

    A row's result does not depend on the other rows. Tokens that tie at the limit of top-k are all kept. Of those that tie
    at the limit of top-p, as many as are needed are kept; here those with the largest ids, in vLLM any, as its sort is not
    stable. Their log-probs are the same.

    Args:
        logits: fp32 [n, V], or log-probs.
        filters: What to apply.
    """
    if filters.min_p > 0.0:
        fraction = (logits - logits.amax(-1, keepdim=True)).exp()
        logits = logits.masked_fill(fraction < filters.min_p, -torch.inf)
    if 0 < filters.top_k < logits.shape[-1]:
        return _top_k(logits, filters.top_k, filters.top_p)
    return _top_p(logits, filters.top_p) if filters.top_p < 1.0 else logits


def log_kept_mass(logits: torch.Tensor, tokens: torch.Tensor, filters: SamplingFilters) -> torch.Tensor:
    """Log of the probability of all tokens that the filters keep, [n] in nats, at most 0.

    Args:
        logits: fp32 [n, V] after the temperature.
        tokens: int64 [n], sampled tokens. They count as kept: another engine may have rounded them across a limit.
        filters: What was applied.
    """
    kept = filtered(logits, filters)
    kept = kept.scatter(-1, tokens[:, None], logits.gather(-1, tokens[:, None]))
    return kept.logsumexp(-1) - logits.logsumexp(-1)


def _top_k(logits: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """The k most likely tokens and all that tie with the last of them; then top-p on these."""
    top = logits.topk(k).values
    kept = logits >= top[:, -1:]
    if p == 1.0:
        return logits.masked_fill(~kept, -torch.inf)
    tied = kept.sum(-1) > k
    result = _cut(logits, top, top.logsumexp(-1, keepdim=True), p)[0]
    if tied.any():
        result[tied] = _top_p(logits[tied].masked_fill(~kept[tied], -torch.inf), p)
    return result


def _top_p(logits: torch.Tensor, p: float, width: int = CANDIDATES) -> torch.Tensor:
    """The fewest most likely tokens with at least p together; the `width` most likely are sorted at first."""
    vocabulary = logits.shape[-1]
    width = width if 4 * width <= vocabulary else vocabulary
    result, short = _cut(logits, logits.topk(width).values, logits.logsumexp(-1, keepdim=True), p)
    if width < vocabulary and short.any():
        result[short] = _top_p(logits[short], p, WIDENING * width)
    return result


def _cut(logits: torch.Tensor, top: torch.Tensor, total: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-p where the limit is among the most likely logits, given in order.

    A token is kept if those ahead of it have less than p together.

    Args:
        logits: fp32 [n, V].
        top: fp32 [n, m], the largest ones, descending.
        total: fp32 [n, 1], log-sum-exp of all that take part.
        p: Probability to reach.

    Returns:
        The filtered logits, and bool [n]: p is not reached within `top`, so that row is not valid.
    """
    mass = (top - total).exp().double().cumsum(-1)
    count = 1 + (mass[:, :-1] < p).sum(-1, keepdim=True)
    limit = top.gather(-1, count - 1)
    kept = logits >= limit
    surplus = kept.sum(-1) > count[:, 0]  # more tokens tie at the limit than are needed
    if surplus.any():
        tied = logits[surplus] == limit[surplus]
        needed = count[surplus] - (top[surplus] > limit[surplus]).sum(-1, keepdim=True)
        kept[surplus] &= ~tied | (tied.flip(-1).cumsum(-1).flip(-1) <= needed)
    return logits.masked_fill(~kept, -torch.inf), mass[:, -1] < p
