"""Causal convolutions on a packed tree: a branch begins with the last inputs of its path.

Every stretch of consecutive rows of a path is preceded by the rows that its first outputs read; then any causal
convolution of a single sequence computes the tree, and its outputs at the repeated rows are dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from pact_fast.model.recurrence.segments import Segment


class ConvolutionPlan(NamedTuple):
    """Inputs of one sequence that computes the tree.

    source  int64 [T'] row of every input; T stands for zeros
    place   int64 [T] position of every row among the inputs
    """

    source: torch.Tensor
    place: torch.Tensor


def convolution_plan(segments: list[Segment], width: int, device: torch.device | str = "cpu") -> ConvolutionPlan:
    """The plan for kernels of `width` taps."""
    rows = segments[-1].end if segments else 0
    source: list[np.ndarray] = []
    place: list[np.ndarray] = []
    at = 0
    for index, segment in enumerate(segments):
        own = np.arange(segment.start, segment.end)
        if segment.parent is None or segment.parent != index - 1:  # else its path is just before it
            before = _last_rows(segments, segment.parent, width - 1)
            source.append(np.pad(before, (width - 1 - len(before), 0), constant_values=rows))
            at += width - 1
        source.append(own)
        place.append(np.arange(at, at + len(own)))
        at += len(own)
    empty = [np.zeros(0, np.int64)]
    return ConvolutionPlan(
        torch.as_tensor(np.concatenate(empty + source), device=device),
        torch.as_tensor(np.concatenate(empty + place), device=device),
    )


def _last_rows(segments: list[Segment], index: int | None, count: int) -> np.ndarray:
    """The last `count` rows of the path that ends with a segment; fewer if it is shorter."""
    parts: list[np.ndarray] = []
    while index is not None and count > 0:
        segment = segments[index]
        parts.append(np.arange(max(segment.start, segment.end - count), segment.end))
        count -= len(parts[-1])
        index = segment.parent
    return np.concatenate([np.zeros(0, np.int64), *parts[::-1]])


def with_tails(x: torch.Tensor, plan: ConvolutionPlan) -> torch.Tensor:
    """x [1, C, T] as the inputs of one sequence, [1, C, T']."""
    return torch.nn.functional.pad(x, (0, 1)).index_select(2, plan.source)
