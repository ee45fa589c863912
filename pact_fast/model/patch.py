"""Fused kernels in place of a decoder's norms, gated MLPs and rotary embeddings (`kernels/decoder/`), within a context.

No model class is named. Code that computes exactly what a kernel computes, which is tested once on probe values, is
replaced until the context ends: a module gets a `forward` attribute, and the rotary function is replaced in the
namespace of the model's code. Weights, hooks and submodules stay in use, except that the three linear layers of a gated
MLP are not called where they are nothing but x·Wᵀ.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.module import _has_any_global_hook

from pact_fast.kernels.decoder.gated_mlp import gated_mlp
from pact_fast.kernels.decoder.pointwise import RmsNorm, Rotary, SiluMul, serves

ROTARY = "apply_rotary_pos_emb"  # the name of this function in all model code of transformers

_enabled = True


@contextmanager
def fused_kernels(decoder: torch.nn.Module) -> Iterator[None]:
    """Run the decoder's pointwise operations in fused kernels while the context lasts.

    Tensors that the kernels do not support still take the modules' own code. Nothing is changed for a decoder that is
    not on the CPU, and for one with gradient checkpointing, which runs its forward code again after the context has
    ended.
    """
    modules = list(decoder.modules())
    on_cpu = all(p.device.type == "cpu" for p in decoder.parameters())
    if not _enabled or not on_cpu or any(getattr(m, "gradient_checkpointing", False) for m in modules):
        yield
        return
    with ExitStack() as undo:
        for module in modules:
            _patch_module(module, undo)
        for name in {type(module).__module__ for module in modules}:
            _patch_rotary(vars(sys.modules[name]), undo)
        yield


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Disable `fused_kernels` while the context lasts, as on devices that the kernels do not support."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def _patch_module(module: torch.nn.Module, undo: ExitStack) -> None:
    """Give the module a fused forward if there is one, unless other code has already replaced its forward."""
    forward = None if "forward" in vars(module) else _fused_forward(module)
    if forward is not None:
        module.forward = forward
        undo.callback(delattr, module, "forward")


def _patch_rotary(namespace: dict[str, Any], undo: ExitStack) -> None:
    original = namespace.get(ROTARY)
    if original is not None and _is_rotary(original):
        namespace[ROTARY] = functools.partial(_rotary_forward, original)
        undo.callback(namespace.__setitem__, ROTARY, original)


def _fused_forward(module: Any) -> Callable[..., Tensor] | None:
    if is_rms_norm(module):
        return functools.partial(_norm_forward, module, functools.partial(type(module).forward, module))
    return functools.partial(_gated_mlp_forward, module) if is_gated_silu(module) else None


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


def rotary_served(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel supports these arguments of `apply_rotary_pos_emb`: one row of tokens."""
    return all(len(x) == 1 and cos.shape == (1, *x.shape[2:]) for x in (q, k)) and serves(q, k, cos, sin)


def _has(module: torch.nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _norm_forward(module: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    if x.shape[-1:] != module.weight.shape or not serves(x, module.weight):
        return original(x)
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)


def _gated_mlp_forward(module: Any, x: Tensor) -> Tensor:
    projections = (module.gate_proj, module.up_proj, module.down_proj)
    if all(map(is_plain_linear, projections)) and not torch.is_autocast_enabled("cpu") and not _has_any_global_hook():
        weights = [projection.weight for projection in projections]
        if serves(x, *weights):
            return gated_mlp(x, *weights)
    gate, up = module.gate_proj(x), module.up_proj(x)
    if not serves(gate, up):
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(SiluMul.apply(gate, up))


def is_plain_linear(module: Any) -> bool:
    """Whether the module computes x·Wᵀ and nothing else: no bias, no adapter, no hook (ZeRO-3's hooks gather W)."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return (
        type(module) is torch.nn.Linear
        and module.bias is None
        and "forward" not in vars(module)
        and not any(getattr(module, name) for name in hooks)
    )


def _rotary_forward(
    original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs or not rotary_served(q, k, cos, sin):
        return original(q, k, cos, sin, *args, **kwargs)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)


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
