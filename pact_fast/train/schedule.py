"""Learning-rate schedules."""

from __future__ import annotations

import math


def lr_factor(update: int, total: int, kind: str, warmup: int) -> float:
    """Learning rate as a fraction of its peak.

    Args:
        update: Index of the optimizer step, from 0.
        total: Number of optimizer steps of the run.
        kind: "constant", "linear" or "cosine" (decay to 0 at `total`).
        warmup: Optimizer steps of linear warm-up.
    """
    if update < warmup:
        return (update + 1) / warmup
    progress = min((update - warmup) / max(total - warmup, 1), 1.0)
    if kind == "linear":
        return 1.0 - progress
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
