"""Uninitialised memory for what is written and read again and again.

In huge pages such a buffer is faster to reach; in exchange its first use may be slow, where the memory is that of a
virtual machine whose host has taken free huge pages back. A gradient is reached once per chunk, and does not earn that.
"""

from __future__ import annotations

import torch

from pact_fast.kernels import build

LARGE = 8 << 20  # bytes


def large_empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty; on CPU in huge pages where the system has them (csrc/memory.cpp)."""
    made = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and made.numel() * made.element_size() >= LARGE and build.status() == "ready":
        torch.ops.pact_fast.advise_huge_pages(made)
    return made
