"""Tests whether a decoder's code computes the same as a kernel of `kernels/decoder/`.

The code is compared with the kernel's formula once, on probe values, so that no model class has to be named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily


def is_rms_norm(module: Any) -> bool:
    """Whether the module computes weight·x/√(mean(x²) + variance_epsilon), as `kernels/decoder/pointwise.py` does."""
    cls: Any = type(module)
    return _has(module, "weight", "variance_epsilon") and _is_norm(cls)


def is_gated_silu(module: Any) -> bool:
    """Whether the module computes down_proj(silu(gate_proj(x))·up_proj(x))."""
    cls: Any = type(module)
    if not _has(module, "gate_proj", "up_proj", "down_proj", "act_fn") or not _is_gated(cls):
        return False
    activation: Any = type(module.act_fn)
    return _is_silu(activation)


def is_rotary(function: Callable[..., Any]) -> bool:
    """Whether the function, an `apply_rotary_pos_emb` of transformers, rotates halves of the last dimension."""
    return _is_rotary(function)


def is_plain_linear(module: Any) -> bool:
    """Whether the module computes x·Wᵀ and nothing else: no bias, no adapter, no hook (ZeRO-3's hooks gather W)."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return (
        type(module) is torch.nn.Linear
        and module.bias is None
        and "forward" not in vars(module)
        and not any(getattr(module, name) for name in hooks)
    )


def forget() -> None:
    """Compare all code again when it is next met."""
    for probe in (_is_norm, _is_gated, _is_silu, _is_rotary):
        probe.cache_clear()


def _has(module: torch.nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


@functools.cache
def _is_rotary(function: Callable[..., Any]) -> bool:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([rotate(q, cos, sin), rotate(k, cos, sin)], 1)

    def inputs(x: Tensor) -> tuple[Tensor, ...]:
        x = x.view(1, 2, 8, 16)
        return x, x[:, :1] + 1.0, x[:, 0].cos(), x[:, 1].sin()

    return _computes(lambda *args: torch.cat(function(*args), 1), formula, inputs)


@functools.cache
def _is_norm(cls: Any) -> bool:
    def formula(module: Any, x: Tensor) -> Tensor:
        x32 = x.float()
        return module.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 0.5)).to(x.dtype)

    return _computes(cls.forward, formula, lambda x: (SimpleNamespace(weight=x[-1], variance_epsilon=0.5), x))


@functools.cache
def _is_gated(cls: Any) -> bool:
    def formula(module: Any, x: Tensor) -> Tensor:
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    parts = {"gate_proj": torch.neg, "up_proj": torch.clone, "down_proj": torch.abs, "act_fn": torch.sinh}
    return _computes(cls.forward, formula, lambda x: (SimpleNamespace(**parts), x))


@functools.cache
def _is_silu(cls: Any) -> bool:
    return _computes(
        cls.forward, lambda _, x: torch.nn.functional.silu(x), lambda x: (SimpleNamespace(inplace=False), x)
    )


def _computes(
    code: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Callable[[Tensor], tuple[Any, ...]]
) -> bool:
    """Whether a model's code computes `formula`, bit for bit, on probe values in fp32 and bf16.

    `inputs` makes the arguments of both from a [16, 16] tensor. In place of a module it passes a namespace that has
    only the attributes that the kernel knows of, so code that reads any other attribute fails and does not match.
    """
    with unset_fake_temporarily():  # fake tensors have no values to compare
        for dtype in (torch.float32, torch.bfloat16):  # bf16 shows where the code casts
            args = inputs(_probe_values(dtype))
            try:
                if not torch.equal(code(*args), formula(*args)):
                    return False
            except Exception:  # the code needs other attributes or arguments
                return False
    return True


def _probe_values(dtype: torch.dtype) -> Tensor:
    """[16, 16] values of both signs, small and up to 50, so that a clamp shows.

    Not random: drawing them would change what the run draws next.
    """
    index = torch.arange(256, dtype=torch.float32, device="cpu").view(16, 16)
    return (torch.sin(2.5 * index) * torch.exp(index / 32 - 4)).to(dtype)
