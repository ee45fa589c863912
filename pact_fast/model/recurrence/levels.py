"""A recurrent rule over a packed tree: one call for each group of segments, in the order of levels.

Autograd carries the gradient back through the states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pact_fast.model.recurrence.segments import Levels, SegmentBatch

# (inputs of a group, states that its segments begin in; None: zeros) → (outputs, final states)
Step = Callable[[list[torch.Tensor], torch.Tensor | None, SegmentBatch], tuple[torch.Tensor, Any]]


def over_levels(step: Step, inputs: Sequence[torch.Tensor], levels: Levels) -> torch.Tensor:
    """The outputs [1, T, …] of a recurrence whose inputs are [1, T, …] each, every row after those of its path.

    Args:
        step: Computes a group. It gets the inputs of its segments and their initial states [B, …], and returns the
            outputs, shaped like the inputs, and the states [B, …] after each segment, which are used if `group.keeps`.
            Inputs are [B, L, …], or [1, n, …] where `group.boundaries` says where segments begin.
        inputs: Per row.
        levels: The pack.
    """
    groups = [group for level in levels.levels for group in level]
    sizes = [group.rows for group in groups]
    pieces = zip(*(x.index_select(1, levels.order).split(sizes, 1) for x in inputs), strict=True)
    outputs: list[torch.Tensor] = []
    states: torch.Tensor | None = None  # those that the level above keeps
    for level in levels.levels:
        kept: list[torch.Tensor] = []
        for group in level:
            own = [x if group.boundaries is not None else _batch(x, group.segments) for x in next(pieces)]
            initial = None if states is None or group.parents is None else states.index_select(0, group.parents)
            out, final = step(own, initial, group)
            outputs.append(out.reshape(1, group.rows, *out.shape[2:]))
            if group.keeps:
                kept.append(final)
        states = torch.cat(kept) if kept else None
    return torch.cat(outputs, 1).index_select(1, levels.place)


def _batch(x: torch.Tensor, count: int) -> torch.Tensor:
    """[1, B·L, …] → [B, L, …]."""
    return x.reshape(count, -1, *x.shape[2:])
