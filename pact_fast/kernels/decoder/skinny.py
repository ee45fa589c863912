"""x·Wᵀ + b for few rows x on CPU, in the time of reading W (csrc/skinny_gemm.cpp): linear layers during decoding.

No autograd: for inference only.
"""

from __future__ import annotations

import functools

import torch

from pact_fast.kernels.runtime import build

MAX_ROWS = {torch.float32: 16, torch.bfloat16: 128}  # beyond these, torch's GEMMs are as fast


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel computes x·Wᵀ here, and faster than torch. x [..., D], weight [V, D], also fp32 beside bf16 x."""
    limit = MAX_ROWS.get(x.dtype)
    if (
        limit is None
        or weight.dtype not in (x.dtype, torch.float32)
        or not x.device.type == weight.device.type == "cpu"
    ):
        return False
    depth = weight.shape[-1]
    return 0 < x.numel() <= limit * depth and depth % 2 == 0 and weight.is_contiguous() and _ready(x.dtype)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x·Wᵀ + b, summed in fp32. Beside bf16 x, W and b in fp32 are rounded to bf16, as autocast does.

    Args:
        x: [..., D], as `serves` accepts it.
        weight: [V, D].
        bias: [V], of the dtype of W.
        dtype: Of the result: that of x (default) or fp32.

    Returns:
        [..., V], contiguous.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(len(rows), len(weight), dtype=dtype or x.dtype)
    _operator()(rows, weight, bias, out)
    return out.view(*x.shape[:-1], len(weight))


@functools.cache
def _ready(dtype: torch.dtype) -> bool:
    return build.status() == "ready" and torch.ops.pact_fast.skinny_gemm_ready(dtype)


@functools.cache  # once, after the library is loaded
def _operator():
    return torch.ops.pact_fast.skinny_gemm.default
