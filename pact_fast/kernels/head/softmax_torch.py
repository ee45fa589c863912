"""Softmax passes of the head in plain torch: any device and dtype; the oracle of softmax_cpp.py and softmax_triton.py.

All three backends read a chunk of logits z [n, V] in the accumulation dtype (fp64 or fp32 here, fp32 in the others) and
change it in place. With T the temperature of a row:

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
    """Rows of a chunk that are paired with another row of it. [n] each; p, q: the row's and its partner's softmax.

    kind        "kl" or "jsd"
    partner     int64  the other row; −1: none
    divergence  KL(p ‖ q), for "jsd" KL(p ‖ m) with m = (p + q)/2, as `divergence` returns it
    own         dL/dKL(p ‖ q), for "jsd" dL/dKL(p ‖ m)
    cross       dL/dKL(q ‖ p); 0 for "jsd"

    dL/dz of the row, before temperature and soft-cap: own·p·(log p − log q − divergence) + cross·(p − q), for "jsd"
    with m in place of q in the first term.
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
    """Statistics of each row; z [n, V] is replaced by the final logits, in place.

    Args:
        z: [n, V] raw logits x·Wᵀ.
        target: [n] int64.
        bias: [V] or None.
        temperature: [n].
        softcap: None: no cap.
    """
    if bias is not None:
        z.add_(bias)
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    z.div_(temperature[:, None])
    lse = z.logsumexp(-1)
    log_p = z.log_softmax(-1)  # not z − lse: where p → 1 only the rounding error of lse would be left
    return RowStats(log_p.gather(1, target[:, None]).squeeze(1), lse, -(log_p.exp() * log_p).sum(-1))


def divergence(z: torch.Tensor, lse: torch.Tensor, partner: torch.Tensor, kind: str) -> torch.Tensor:
    """[n] KL(p ‖ q) ("kl") or KL(p ‖ (p + q)/2) ("jsd"), p and q the row's and its partner's softmax; 0 if partner is −1.

    z [n, V]: final logits; lse [n]: their log-sum-exp; partner [n] int64.
    """
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
    """out[j] ← dL/d(raw logits) of row source[j], for the m entries of `source`.

        dz = [g·(onehot − p) − h·p·(log p + H) + pair]·(1 − (z·T/softcap)²)/T        pair: see Pairing

    Args:
        z: [n, V] final logits, as `forward` left them.
        out: [≥ m, V]. May be z itself if there is no pairing and `source` comes from `compaction_index`: no row is then
            overwritten before it has been read.
        source: [m] int64, rows with a gradient.
        target: [n] int64.
        temperature: [n].
        softcap: None: no cap.
        stats: Of `forward`.
        g: [n] dL/dlogprob.
        h: [n] dL/dentropy; None: 0.
        pairing: Pairs of rows, or None.
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


def compaction_index(active: torch.Tensor) -> torch.Tensor:
    """[m] int64: entry j is the row that moves to row j when the m active rows of a chunk are compacted. active: [n] bool.

    Active rows among the first m stay; the others fill the gaps between them. All moves can then run at once and in
    place: every row that is overwritten is inactive.
    """
    m = int(active.sum())
    source = torch.arange(m, device=active.device)
    source[~active[:m]] = m + active[m:].nonzero().squeeze(1)
    return source
