"""Uninitialised memory for large results."""

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
