"""Activations that one pointwise step makes from others are not kept for the backward pass, but made again there.

A gated MLP keeps gate, up, silu(gate) and silu(gate)·up; a norm keeps x, x/rms and weight·x/rms. Autograd holds the first
of each in any case, and one pass over memory gives the others back, bit for bit. No model code is touched: a function mode
sees which tensor goes into which operation, and a hook on saved tensors keeps the graph node of a product instead of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

Kept = tuple[torch.Tensor, int] | tuple[Node, torch.Size]  # with its version, or how to make it


class Rematerialize(TorchFunctionMode):
    """A context for a forward pass; the backward pass may come after it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self._inputs: dict[
            tuple[int, int], tuple[int, Node]
        ] = {}  # place → (elements, node), of the operation that is running
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Rematerialize:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._inputs = {
            _place(t): (t.numel(), node)
            for t in args
            if isinstance(t, torch.Tensor) and (node := _maker(t)) is not None and _can_be_made(t, node)
        }
        result = func(*args, **(kwargs or {}))
        self._inputs = {}
        return result

    def _pack(self, tensor: torch.Tensor) -> Kept:
        """What autograd gives is detached; by its memory it is one of the inputs, perhaps in another shape."""
        size, node = self._inputs.get(_place(tensor), (0, None))
        if node is None or size != tensor.numel() or not tensor.is_contiguous():
            return tensor, tensor._version
        return node, tensor.shape


def is_compiled(model: torch.nn.Module) -> bool:
    """Compiled code chooses itself what to keep, and a function mode would break it up."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where its memory begins; also of tensors that have none, in which a size is estimated (estimate/update_trace.py)."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _maker(tensor: torch.Tensor) -> Node | None:
    """The step that made it. ZeRO-3's hooks put an identity behind every module; through it one may see silu alone, because
    the weight that a product takes can be released by the time it is made again.
    """
    node = tensor.grad_fn
    if node is not None and node.name().startswith("PreBackwardFunction"):
        inner = node.next_functions[0][0]
        return inner if inner is not None and inner.name() == "SiluBackward0" else None
    return node


def _can_be_made(tensor: torch.Tensor, node: Node) -> bool:
    """It is as the step left it, and all that the step takes is saved: each factor, if the other one has a gradient."""
    if tensor._version or not tensor.is_contiguous():
        return False
    if hasattr(node, "recompute"):
        return True
    if node.name() == "MulBackward0":
        return all(source is not None for source, _ in node.next_functions)
    return node.name() == "SiluBackward0"


def _unpack(kept: Kept) -> torch.Tensor:
    """The engine frees what a node has saved when it has run, which is after all that use its result."""
    saved: Any
    saved, known = kept
    if isinstance(saved, torch.Tensor):
        if saved._version != known:  # autograd leaves this check to hooks
            raise RuntimeError("a tensor needed for the gradient has been modified by an inplace operation")
        return saved
    with torch.no_grad():
        if hasattr(saved, "recompute"):  # a function of our own (kernels/decoder/pointwise.py)
            return saved.recompute(saved).view(known)
        if saved.name() == "SiluBackward0":
            return torch.nn.functional.silu(saved._saved_self).view(known)
        return (saved._saved_self * saved._saved_other).view(known)
