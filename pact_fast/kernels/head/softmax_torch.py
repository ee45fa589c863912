"""The row pass of the head in plain torch: any device, any dtype; the oracle of rows_cpp.py and rows_triton.py.

All three take a chunk of logits z [n, V] in the accumulation dtype (fp64 or fp32 here, fp32 there) and change it in
place. What a row's softmax is, with T the temperature of the row:

    z ← softcap·tanh((z + b)/softcap)/T        log p = z − lse        H = −Σ p·log p
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

KL, JSD = "kl", "jsd"


class RowStats(NamedTuple):
    """[n] each, in the accumulation dtype: log-prob of the target, log-sum-exp and entropy of the final logits."""

    logprob: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor


class Pairing(NamedTuple):
    """What couples a row to another one of the same chunk. [n] each.

    partner     int64  the other row; −1: none
    divergence  what `divergence` gave
    own, cross  dL/dKL(p ‖ partner's) (kind "jsd": dL/dKL(p ‖ mean of both)) and dL/dKL(partner's ‖ p)
    """

    kind: str
    partner: torch.Tensor
    divergence: torch.Tensor
    own: torch.Tensor
    cross: torch.Tensor


def forward(
    z: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    softcap: float | None,
) -> RowStats:
    """z [n, V] becomes the final logits. target [n] int64, bias [V] or None, temperature [n]."""
    if bias is not None:
        z.add_(bias)
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    z.div_(temperature[:, None])
    lse = z.logsumexp(-1)
    log_p = z.log_softmax(-1)  # not z − lse: where p → 1 the rounded lse would be all that is left
    return RowStats(log_p.gather(1, target[:, None]).squeeze(1), lse, -(log_p.exp() * log_p).sum(-1))


def divergence(z: torch.Tensor, lse: torch.Tensor, partner: torch.Tensor, kind: str) -> torch.Tensor:
    """[n]: KL of the row's softmax to its partner's ("kl") or to the mean of both ("jsd"); 0 without a partner."""
    log_p = z - lse[:, None]
    other = log_p[partner.clamp(min=0)]
    if kind == JSD:
        other = torch.logaddexp(log_p, other) - math.log(2.0)
    return torch.where(partner >= 0, (log_p.exp() * (log_p - other)).sum(-1), 0.0)


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
    """out[j] ← dL/d(raw logits) of row source[j] of the final logits z, for the m entries of `source`.

    g, h [n]: dL/dlogprob and dL/dentropy by row (h None: 0). `out` [≥ m, V] may be z itself if there is no pairing and
    `source` is what `compact` gives: a row then never overwrites one that is still to be read.

        dz = [g·(onehot − p) − h·p·(log p + H) + pair]·(1 − (z·T/softcap)²)/T
        pair = own·p·(log p − log q − divergence) + cross·(p − q)      q: the partner's softmax, or the mean of both
    """
    rows = z[source]
    log_p = rows - stats.lse[source, None]
    log_p.scatter_(1, target[source, None], stats.logprob[source, None])  # where p → 1, lse is too coarse
    p = log_p.exp()
    dz = -g[source, None] * p
    # 1 − p by expm1: where p → 1, g − g·p would lose every digit
    dz.scatter_(1, target[source, None], (-g * stats.logprob.expm1())[source, None])
    if h is not None:
        dz -= h[source, None] * p * (log_p + stats.entropy[source, None])
    if pairing is not None:
        partner = pairing.partner[source]
        other = (z - stats.lse[:, None])[partner.clamp(min=0)]
        q = other if pairing.kind == KL else torch.logaddexp(log_p, other) - math.log(2.0)
        term = pairing.own[source, None] * p * (log_p - q - pairing.divergence[source, None])
        term += pairing.cross[source, None] * (p - other.exp())
        dz += torch.where(partner[:, None] >= 0, term, 0.0)
    if softcap:
        dz *= 1.0 - (rows * (temperature[source, None] / softcap)).square()
    out[: len(source)] = dz / temperature[source, None]


def compact(active: torch.Tensor) -> torch.Tensor:
    """Where the m active rows of a chunk go: [m] int64, entry j is the row that takes place j. active [n] bool.

    Active rows among the first m stay; the others fill the places between them. Moves are then independent of each
    other: a place that is filled belongs to a row that nobody reads.
    """
    m = int(active.sum())
    source = torch.arange(m, device=active.device)
    source[~active[:m]] = m + active[m:].nonzero().squeeze(1)
    return source
