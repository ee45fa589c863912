"""Importance weights that the loss cannot form token by token; computed before the first optimizer step of a batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pact_fast.algorithms.base import ImportanceWeight
from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.components import LossContext

MAX_LOG_RATIO = 50.0  # keeps exp finite


def set_importance_weights(scored: Iterable[ScoredTokens], context: LossContext, rule: ImportanceWeight) -> None:
    """Fill in `importance` of the rollouts scored in `context`. Requires their `old_logprob`.

    A rollout with branches has several ScoredTokens, and one weight if the rule is one per rollout.
    """
    rollouts: dict[tuple[int, int | None], list[ScoredTokens]] = {}
    for s in scored:
        if s.context == context and len(s.index):
            rollouts.setdefault((s.prompt, s.rollout), []).append(s)
    for parts in rollouts.values():
        old, sampler = (
            np.concatenate([getattr(s, name) for s in parts]) for name in ("old_logprob", "sampler_logprob")
        )
        weights = np.split(importance_weight(old, sampler, rule), np.cumsum([len(s.index) for s in parts])[:-1])
        for s, weight in zip(parts, weights, strict=True):
            s.importance = weight


def importance_weight(old: np.ndarray, sampler: np.ndarray, rule: ImportanceWeight) -> np.ndarray:
    """Importance weights w = π_old/π_sampler of one rollout's tokens, bounded as `rule` says; float64 [m].

    Args:
        old: Log-probs under π_old, float32 [m].
        sampler: Log-probs reported by the sampler, float32 [m].
        rule: Level (token, sequence product, geometric mean) and bound (truncate, mask).
    """
    log_ratio = (old - sampler).astype(np.float64)
    if rule.level == "sequence":
        log_ratio = np.full_like(log_ratio, log_ratio.sum())
    elif rule.level == "geometric_mean":
        log_ratio = np.full_like(log_ratio, log_ratio.mean())
    weight = np.exp(np.minimum(log_ratio, MAX_LOG_RATIO))
    if rule.bound == "truncate":
        return np.minimum(weight, rule.clip_max)
    return np.where(weight <= rule.clip_max, weight, 0.0)
