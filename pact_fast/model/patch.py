"""Fused kernels in place of a decoder's norms, gated MLPs and rotary embeddings (`kernels/decoder/`), within a context.

No model class is named. Code that computes exactly what a kernel computes (`recognition.py`) is replaced until the context
ends: a module gets a `forward` attribute, and the rotary function is replaced in the
namespace of the model's code. Weights, hooks and submodules stay in use, except that the three linear layers of a gated
MLP are not called where they are nothing but x·Wᵀ.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from pact_fast.kernels.decoder.gated_mlp import gated_mlp
from pact_fast.kernels.decoder.pointwise import RmsNorm, Rotary, SiluMul, serves
from pact_fast.model.recognition import is_gated_silu, is_plain_linear, is_rms_norm, is_rotary

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
    if original is not None and is_rotary(original):
        namespace[ROTARY] = functools.partial(_rotary_forward, original)
        undo.callback(namespace.__setitem__, ROTARY, original)


def _fused_forward(module: Any) -> Callable[..., Tensor] | None:
    if is_rms_norm(module):
        return functools.partial(_norm_forward, module, functools.partial(type(module).forward, module))
    return functools.partial(_gated_mlp_forward, module) if is_gated_silu(module) else None


def rotary_served(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel supports these arguments of `apply_rotary_pos_emb`: one row of tokens."""
    return all(len(x) == 1 and cos.shape == (1, *x.shape[2:]) for x in (q, k)) and serves(q, k, cos, sin)


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


def _rotary_forward(
    original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs or not rotary_served(q, k, cos, sin):
        return original(q, k, cos, sin, *args, **kwargs)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)
