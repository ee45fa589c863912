"""Statistics of a row's final logits beside log-prob and entropy, on demand: plain torch on the chunk that exists anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pact_fast.errors import PactError
from pact_fast.kernels.head.softmax_torch import RowStats

Statistic = Callable[[torch.Tensor, torch.Tensor, RowStats], torch.Tensor]

# (z [n, V] final logits, target [n], stats of the row) → [n]
STATISTICS: dict[str, Statistic] = {
    "is_top1": lambda z, target, stats: z.argmax(-1) == target,  # of equal logits the first one is the top
    "mean_logit": lambda z, target, stats: z.mean(-1),
    "log_sum_sq_probs": lambda z, target, stats: (2.0 * z).logsumexp(-1) - 2.0 * stats.lse,
    "min_logit": lambda z, target, stats: z.amin(-1),
    "max_logit": lambda z, target, stats: z.amax(-1),
}


def check_statistics(names: Sequence[str]) -> str:
    """The names as one string, as operators take them. Raises PactError for an unknown name."""
    names = (names,) if isinstance(names, str) else names
    for name in names:
        if name not in STATISTICS:
            raise PactError(f"statistics='{name}' is unknown; use {', '.join(STATISTICS)}")
    return ",".join(names)


def split_names(statistics: str) -> list[str]:
    """The names in a string of `check_statistics`."""
    return statistics.split(",") if statistics else []


def row_statistics(names: Sequence[str], z: torch.Tensor, target: torch.Tensor, stats: RowStats) -> torch.Tensor:
    """[len(names), n] in the dtype of z."""
    return torch.stack([STATISTICS[name](z, target, stats).to(z.dtype) for name in names])


def by_name(statistics: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: [N]} of an operator's [len(names), N]; is_top1 as bool."""
    columns = zip(split_names(statistics), values.detach().unbind(), strict=True)
    return {name: column.bool() if name == "is_top1" else column for name, column in columns}
