"""Which kernel backends are available on this machine, and which one a call uses."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from pact_fast.errors import PactError
from pact_fast.kernels.runtime import build


def backends() -> dict[str, str]:
    """Status of every backend: {"torch": "ready", "triton": …, "cpp": …}, "ready" or the reason why it is not available.

    The first call compiles the C++ library unless it is cached (about fifteen seconds).
    """
    return {"torch": "ready", "triton": _triton_status(), "cpp": build.status()}


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for tensors of this device and dtype. `name`: one of `backends()`, or "auto" for the fastest.

    Raises:
        PactError: The named backend is unknown, not available, or does not support this device or dtype.
    """
    if name == "auto":
        return _fastest(device, dtype)
    known = backends()
    reason = known.get(name, f"no such backend; there are {', '.join(known)}")
    if reason == "ready" and name != "torch":
        supported = "cuda" if name == "triton" and not interpreted() else "cpu"
        if device.type != supported:
            reason = f"it supports {supported} tensors, not {device.type}"
        elif dtype == torch.float64:
            reason = "it computes in fp32, and fp64 needs backend='torch'"
    if reason != "ready":
        raise PactError(f"backend='{name}': {reason}; use backend='auto'")
    return name


def softmax_module(name: str) -> ModuleType:
    """The module with the softmax passes of a backend, as `resolve` returns it."""
    return importlib.import_module(f"pact_fast.kernels.head.softmax_{name}")


def interpreted() -> bool:
    """True if Triton's interpreter is on (TRITON_INTERPRET=1): kernels then run on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "torch"
    if device.type == "cuda" and _triton_status() == "ready":
        return "triton"
    if device.type == "cpu" and build.status() == "ready":
        return "cpp"
    if device.type == "cpu":
        _warn_once(build.status())
    return "torch"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"pact_fast: the CPU kernels are not used ({reason}); falling back to plain torch, slower", stacklevel=2
    )


@functools.cache
def _triton_status() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA device"
    return "ready"
