"""Uninitialised memory for what a pass writes and reads again and again.

On CPU the memory of one pass is kept for the next one. A system zeroes every page before it gives it out, and a virtual
machine may have to ask its host for it as well. Huge pages make the memory faster to reach; their first use may be slow, and
is paid once. On CUDA torch's allocator does all this.
"""

from __future__ import annotations

import math

import torch

from pact_fast.kernels.runtime import build

LARGE = 8 << 20  # bytes from which on huge pages are asked for
PAGE = 4096

_kept: list[torch.Tensor] = []  # at most one block; whoever pops it has it alone, whatever thread it is


class Scratch:
    """Memory of one pass: `size` bytes on CPU, given out piece by piece. No piece may be used when this has gone."""

    def __init__(self, size: int, device: torch.device):
        self._device, self._next = device, 0
        self._block = _take(size) if device.type == "cpu" else None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised. On CPU, what is given out adds up to `room` of each piece."""
        if self._block is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        begin, size = self._next, math.prod(shape) * dtype.itemsize
        self._next += padded_nbytes(shape, dtype)
        return self._block[begin : begin + size].view(dtype).view(shape)

    def __del__(self) -> None:
        if self._block is not None:
            _kept[:] = [self._block]


def padded_nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a piece takes of a Scratch: whole pages."""
    return -(-math.prod(shape) * dtype.itemsize // PAGE) * PAGE


def release_memory() -> None:
    """Give what is kept between passes on CPU back to the system."""
    _kept.clear()


def _take(size: int) -> torch.Tensor:
    """The block that is kept, if it is large enough, else a new one."""
    try:
        block = _kept.pop()
    except IndexError:
        block = None
    if block is not None and len(block) >= size:
        return block
    del block  # before there is another one
    with torch.inference_mode(False):  # else later passes with gradients could not write to it
        made = torch.empty(size, dtype=torch.uint8)
    if size >= LARGE and build.status() == "ready":
        torch.ops.pact_fast.advise_huge_pages(made)
    return made
