"""A decoder's norms, gated MLPs and rotary embeddings through kernels of one pass (kernels/decoder/pointwise.py), for a while.

No model class is named: what computes exactly what a kernel does, which is tried out once on a few numbers, gets that
kernel until the context ends; a module as a forward of its own, the rotary function in the namespace of the model's code.
Weights, hooks and submodules stay in use; the products of a gated MLP are not called where they are nothing but x·Wᵀ.
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

ROTARY = "apply_rotary_pos_emb"  # what models call it, always by this name

_allowed = True


@contextmanager
def fused_kernels(decoder: torch.nn.Module) -> Iterator[None]:
    """Tensors that the kernels do not serve go through the modules' own code here, too.

    A decoder on another device is left alone, and one with gradient checkpointing: it runs again when the context has ended.
    """
    modules = list(decoder.modules())
    elsewhere = any(p.device.type != "cpu" for p in decoder.parameters())
    if not _allowed or elsewhere or any(getattr(m, "gradient_checkpointing", False) for m in modules):
        yield
        return
    with ExitStack() as undo:
        for module in modules:
            _put(module, undo)
        for name in {type(module).__module__ for module in modules}:
            _put_rotary(vars(sys.modules[name]), undo)
        yield


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Inside, `fused` changes nothing: as it is on devices that the kernels do not serve."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def _put(module: torch.nn.Module, undo: ExitStack) -> None:
    """Give the module a fused forward, if there is one for it. One that somebody else has put there stays."""
    forward = None if "forward" in vars(module) else _forward(module)
    if forward is not None:
        module.forward = forward
        undo.callback(delattr, module, "forward")


def _put_rotary(code: dict[str, Any], undo: ExitStack) -> None:
    own = code.get(ROTARY)
    if own is not None and _is_rotary(own):
        code[ROTARY] = functools.partial(_rotary, own)
        undo.callback(code.__setitem__, ROTARY, own)


def _forward(module: Any) -> Callable[..., Tensor] | None:
    cls: Any = type(module)
    if _has(module, "weight", "variance_epsilon") and _is_norm(cls):
        return functools.partial(_norm, module, functools.partial(cls.forward, module))
    if _has(module, "gate_proj", "up_proj", "down_proj", "act_fn") and _is_gated(cls):
        act: Any = type(module.act_fn)
        return functools.partial(_gated, module) if _is_silu(act) else None
    return None


def _has(module: torch.nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _norm(module: Any, own: Callable[..., Tensor], x: Tensor) -> Tensor:
    if x.shape[-1:] != module.weight.shape or not serves(x, module.weight):
        return own(x)
    return RmsNorm.apply(x, module.weight, module.variance_epsilon)


def _gated(module: Any, x: Tensor) -> Tensor:
    products = (module.gate_proj, module.up_proj, module.down_proj)
    if all(map(_is_plain, products)) and not torch.is_autocast_enabled("cpu") and not _has_any_global_hook():
        weights = [product.weight for product in products]
        if serves(x, *weights):
            return gated_mlp(x, *weights)
    gate, up = module.gate_proj(x), module.up_proj(x)
    if not serves(gate, up):
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(SiluMul.apply(gate, up))


def _is_plain(product: Any) -> bool:
    """x·Wᵀ and nothing else: no bias, no adapter, nobody who looks on or gathers the weight."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return (
        type(product) is torch.nn.Linear
        and product.bias is None
        and "forward" not in vars(product)
        and not any(getattr(product, name) for name in hooks)
    )


def _rotary(own: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    served = all(len(x) == 1 and cos.shape == (1, *x.shape[2:]) for x in (q, k)) and serves(q, k, cos, sin)
    if args or kwargs or not served:
        return own(q, k, cos, sin, *args, **kwargs)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)


@functools.cache
def _is_rotary(function: Callable[..., Any]) -> bool:
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([turned(q, cos, sin), turned(k, cos, sin)], 1)

    def inputs(x: Tensor) -> tuple[Tensor, ...]:
        x = x.view(1, 2, 8, 16)
        return x, x[:, :1] + 1.0, x[:, 0].cos(), x[:, 1].sin()

    return _agree(lambda *args: torch.cat(function(*args), 1), both, inputs)


@functools.cache
def _is_norm(cls: Any) -> bool:
    def norm(module: Any, x: Tensor) -> Tensor:
        wide = x.float()
        return module.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.5)).to(x.dtype)

    return _agree(cls.forward, norm, lambda x: (SimpleNamespace(weight=x[-1], variance_epsilon=0.5), x))


@functools.cache
def _is_gated(cls: Any) -> bool:
    def gated(module: Any, x: Tensor) -> Tensor:
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    parts = {"gate_proj": torch.neg, "up_proj": torch.clone, "down_proj": torch.abs, "act_fn": torch.sinh}
    return _agree(cls.forward, gated, lambda x: (SimpleNamespace(**parts), x))


@functools.cache
def _is_silu(cls: Any) -> bool:
    return _agree(cls.forward, lambda _, x: torch.nn.functional.silu(x), lambda x: (SimpleNamespace(inplace=False), x))


def _agree(
    code: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Callable[[Tensor], tuple[Any, ...]]
) -> bool:
    """Whether a model's code is this formula, to the bit. `inputs` makes of numbers what both take; for a module that is a
    stand-in which has nothing but the parts that the kernel knows of.
    """
    with unset_fake_temporarily():  # no sizes without numbers here
        for dtype in (torch.float32, torch.bfloat16):  # which differ where one casts earlier than the other
            args = inputs(_numbers(dtype))
            try:
                if not torch.equal(code(*args), formula(*args)):
                    return False
            except Exception:  # it asks for more than these parts, or does not take them: another kind
                return False
    return True


def _numbers(dtype: torch.dtype) -> Tensor:
    """[16, 16], small and large, of both signs: a clamp must not go unnoticed. Not drawn: runs depend on what is drawn next."""
    place = torch.arange(256, dtype=torch.float32, device="cpu").view(16, 16)
    return (torch.sin(2.5 * place) * torch.exp(place / 32 - 4)).to(dtype)
