"""Kernels for forward passes without gradient, in place of a decoder's linear layers, norms, gated MLPs and rotary
embeddings, within a context.

As in `model/patch.py`, no model class is named, weights and hooks stay in use, and tensors that a kernel does not
support take the module's own code. Beyond that, linear layers of few rows are computed in the time of reading their
weights, which is what decoding consists of. What is replaced is looked up once: a decoding step takes milliseconds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pact_fast.kernels.decoder import skinny
from pact_fast.kernels.decoder.pointwise import rms_norm, rotary, serves, silu_mul
from pact_fast.model.patch import ROTARY, rotary_served
from pact_fast.model.recognition import is_gated_silu, is_rms_norm, is_rotary
from pact_fast.model.rematerialize import is_compiled

_Entry = tuple[dict[str, Any], str, Any]  # (namespace, name, replacement)


class InferenceKernels:
    """Use as a context: `with kernels:` replaces, and restores at the end.

    Nothing is changed for a decoder that is not on the CPU, or that is compiled: there the compiler chooses kernels.
    Layers that are added to the decoder later (adapters) keep their own code.
    """

    def __init__(self, decoder: torch.nn.Module):
        self._entries: list[_Entry] = []
        self._undo: list[_Entry] = []
        modules = list(decoder.modules())
        if is_compiled(decoder) or any(p.device.type != "cpu" for p in decoder.parameters()):
            return
        for module in modules:
            forward = _forward_of(module)
            if forward is not None:
                self._entries.append((vars(module), "forward", forward))
        for name in {type(module).__module__ for module in modules}:
            namespace = vars(sys.modules[name])
            original = namespace.get(ROTARY)
            if original is not None and is_rotary(original):
                self._entries.append((namespace, ROTARY, functools.partial(_rotary, original)))

    def __enter__(self) -> None:
        for namespace, name, replacement in self._entries:
            if name == "forward" and name in namespace:  # other code has replaced it already
                continue
            self._undo.append((namespace, name, namespace.get(name)))
            namespace[name] = replacement

    def __exit__(self, *_: object) -> None:
        while self._undo:
            namespace, name, original = self._undo.pop()
            if original is None:
                del namespace[name]
            else:
                namespace[name] = original


def _forward_of(module: Any) -> Callable[..., Tensor] | None:
    if type(module) is torch.nn.Linear:
        return functools.partial(_linear, module)
    if is_rms_norm(module):
        return functools.partial(_norm, module, functools.partial(type(module).forward, module))
    return functools.partial(_gated_silu, module) if is_gated_silu(module) else None


def _linear(module: torch.nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """torch.nn.functional.linear, by the kernel for few rows where that serves.

    Args:
        x: [..., D].
        weight: [V, D].
        bias: [V].
        dtype: Of the result, if not that of `torch.nn.functional.linear`; fp32 sums are then not rounded before.

    Returns:
        [..., V].
    """
    rows = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
    if skinny.serves(rows, weight):
        return skinny.linear(rows, weight, bias, dtype)
    out = torch.nn.functional.linear(x, weight, bias)
    return out if dtype is None else out.to(dtype)


def _norm(module: Any, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.shape[-1:] != module.weight.shape or not serves(x, module.weight):
        return original(x)
    return rms_norm(x, module.weight, module.variance_epsilon)


def _gated_silu(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(silu_mul(gate, up) if serves(gate, up) else module.act_fn(gate) * up)


def _rotary(original: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any):
    if args or kwargs or not rotary_served(q, k, cos, sin):
        return original(q, k, cos, sin, *args, **kwargs)
    return rotary(q, cos, sin), rotary(k, cos, sin)
