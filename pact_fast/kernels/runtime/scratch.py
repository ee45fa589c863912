"""Uninitialised working memory that is reused between calls.

On CPU the block of one call is kept for the next: the operating system zeroes every page it hands out, and a virtual
machine may have to request it from its host. Huge pages reduce TLB misses; their first use may be slow, and reuse pays for
it only once. On CUDA torch's caching allocator does the same.
"""

from __future__ import annotations

import math

import torch

from pact_fast.kernels.runtime import build

HUGE_PAGE_BYTES = 8 << 20  # huge pages are requested for blocks of at least this size
PAGE_BYTES = 4096

_kept: list[torch.Tensor] = []  # at most one block; pop is atomic, so one thread owns it


class Scratch:
    """A bump allocator: `size` bytes on CPU, from which tensors are taken. They must not be used once this is deleted."""

    def __init__(self, size: int, device: torch.device):
        self._device, self._next = device, 0
        self._block = _reuse_or_allocate(size) if device.type == "cpu" else None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor. On CPU each one takes `padded_nbytes(shape, dtype)` bytes of `size`."""
        if self._block is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        start, size = self._next, math.prod(shape) * dtype.itemsize
        self._next += padded_nbytes(shape, dtype)
        return self._block[start : start + size].view(dtype).view(shape)

    def __del__(self) -> None:
        if self._block is not None:
            _kept[:] = [self._block]


def padded_nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a tensor takes of a Scratch: whole pages."""
    return -(-math.prod(shape) * dtype.itemsize // PAGE_BYTES) * PAGE_BYTES


def release_memory() -> None:
    """Return the working memory that is kept between calls on CPU to the system."""
    _kept.clear()


def _reuse_or_allocate(size: int) -> torch.Tensor:
    """The kept block if it is large enough, else a new one."""
    try:
        block = _kept.pop()
    except IndexError:
        block = None
    if block is not None and len(block) >= size:
        return block
    del block  # before the new one is allocated
    with torch.inference_mode(False):  # an inference tensor could not be written by later calls with gradients
        block = torch.empty(size, dtype=torch.uint8)
    if size >= HUGE_PAGE_BYTES and build.status() == "ready":
        torch.ops.pact_fast.advise_huge_pages(block)
    return block
