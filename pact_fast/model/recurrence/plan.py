"""Index tensors of a pack for recurrent layers, made at first use and shared by all layers."""

from __future__ import annotations

import functools

import numpy as np
import torch

from pact_fast.model.recurrence.convolution import ConvolutionPlan, convolution_plan
from pact_fast.model.recurrence.segments import Levels, Segment, levels_of, segments_of


class RecurrencePlan:
    """The segments of a pack. subtree_end: int64 [T], see PackedBatch; device: where the layers are."""

    def __init__(self, subtree_end: np.ndarray, device: torch.device | str = "cpu"):
        self._subtree_end, self._device = subtree_end, device
        self._levels: dict[bool, Levels] = {}
        self._convolutions: dict[int, ConvolutionPlan] = {}

    @functools.cached_property
    def segments(self) -> list[Segment]:
        return segments_of(self._subtree_end)

    def levels(self, *, padded: bool) -> Levels:
        """See `levels_of`."""
        if padded not in self._levels:
            self._levels[padded] = levels_of(self.segments, self._device, padded=padded)
        return self._levels[padded]

    def convolution(self, width: int) -> ConvolutionPlan:
        """The plan of convolutions with `width` taps."""
        if width not in self._convolutions:
            self._convolutions[width] = convolution_plan(self.segments, width, self._device)
        return self._convolutions[width]
