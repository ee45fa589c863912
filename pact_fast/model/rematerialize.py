"""Rematerialization of pointwise activations: the backward pass recomputes them instead of keeping them.

A gated MLP keeps gate, up, silu(gate) and silu(gate)·up for its backward pass; a norm keeps x, x/rms and weight·x/rms.
Autograd needs the first of each in any case, and one pass over memory gives the others again, bit for bit. No model
code is changed: a torch function mode sees the inputs of every operation, and a saved-tensor hook stores the graph node
that produced a tensor in place of the tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

# in place of a saved tensor: the tensor and its version, or the node that recomputes it and its shape
Saved = tuple[torch.Tensor, int] | tuple[Node, torch.Size]


class Rematerialize(TorchFunctionMode):
    """A context for a forward pass. The backward pass may run after the context has ended."""

    def __init__(self) -> None:
        super().__init__()
        # inputs of the running operation that can be recomputed: storage → (number of elements, node)
        self._inputs: dict[tuple[int, int], tuple[int, Node]] = {}
        self._hooks = saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Rematerialize:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._inputs = {
            _storage_key(t): (t.numel(), node)
            for t in args
            if isinstance(t, torch.Tensor) and (node := _producer(t)) is not None and _can_recompute(t, node)
        }
        result = func(*args, **(kwargs or {}))
        self._inputs = {}
        return result

    def _pack(self, tensor: torch.Tensor) -> Saved:
        """Autograd passes a detached tensor, perhaps in another shape; its storage shows which input it is."""
        size, node = self._inputs.get(_storage_key(tensor), (0, None))
        if node is None or size != tensor.numel() or not tensor.is_contiguous():
            # A node that keeps its own result keeps itself: without a backward pass, nothing would free the graph.
            # Leaves stay as they are, since ZeRO-3 replaces their data.
            return tensor if tensor.grad_fn is None else tensor.detach(), tensor._version
        return node, tensor.shape


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether any module is compiled: the compiler decides what to keep, and a function mode would break its graphs."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())


def _storage_key(tensor: torch.Tensor) -> tuple[int, int]:
    """Identity of the storage, and the offset in it; defined for fake tensors, too, which have no data pointer."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _producer(tensor: torch.Tensor) -> Node | None:
    """The graph node that computed the tensor.

    ZeRO-3's hooks add an identity node behind every module. It is skipped only for silu: a product might need a weight
    that ZeRO-3 has released by the time of the backward pass.
    """
    node = tensor.grad_fn
    if node is not None and node.name().startswith("PreBackwardFunction"):
        inner = node.next_functions[0][0]
        return inner if inner is not None and inner.name() == "SiluBackward0" else None
    return node


def _can_recompute(tensor: torch.Tensor, node: Node) -> bool:
    """Whether the tensor is unmodified and the node has saved all of its inputs.

    A product saves a factor only if the other factor needs a gradient.
    """
    if tensor._version or not tensor.is_contiguous():
        return False
    if hasattr(node, "recompute"):
        return True
    if node.name() == "MulBackward0":
        return all(source is not None for source, _ in node.next_functions)
    return node.name() == "SiluBackward0"


def _unpack(saved: Saved) -> torch.Tensor:
    """The saved tensor, recomputed if only its node was kept.

    The node still has its saved tensors: the engine frees them when the node has run, which is after every use of its
    result.
    """
    source: Any
    source, expected = saved
    if isinstance(source, torch.Tensor):
        if source._version != expected:  # autograd does not check this for tensors that go through hooks
            raise RuntimeError("a tensor needed for the gradient has been modified by an inplace operation")
        return source
    with torch.no_grad():
        if hasattr(source, "recompute"):  # an autograd function of this package (kernels/decoder/pointwise.py)
            return source.recompute(source).view(expected)
        if source.name() == "SiluBackward0":
            return torch.nn.functional.silu(source._saved_self).view(expected)
        return (source._saved_self * source._saved_other).view(expected)
