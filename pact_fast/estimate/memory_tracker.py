"""Records which memory a computation holds at each moment, under FakeTensorMode, where tensors have no storage contents.

FakeTensorMode gives every operator a result without data. This dispatch mode runs above it and records the size of every
new storage, and when it is freed. The record is replayed afterwards, when it is known which storages became gradients.
A replay may scale kinds of memory, for a device that holds a fraction of the gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BY_FLOPS = ("mm", "attention", "empty")  # parts of operator names; their time is not bound by memory traffic


class MemoryKind(Enum):
    """Uses of memory. The value is the display name."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer states"
    ACTIVATIONS = "activations"
    HEAD = "head buffers"


class MemoryTracker(TorchDispatchMode):
    """Context manager that records the storages made inside it.

    kind     MemoryKind of storages made from now on
    traffic  bytes read and written so far by operators other than matrix products and attention
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = MemoryKind.ACTIVATIONS
        self.traffic = 0
        self._ids: dict[int, int] = {}  # address of a live storage → its id, an index into the next two lists
        self._kinds: list[MemoryKind] = []
        self._sizes: list[int] = []
        self._events: list[tuple[int, int]] = []  # (id, +1 allocated or −1 freed), in order of time

    def add(self, tensors: Iterable[torch.Tensor], kind: MemoryKind) -> None:
        """Classify tensors, from their allocation on. Unknown ones count as allocated now."""
        for tensor in tensors:
            self._kinds[self._id(tensor)] = kind

    def peak(self, fractions: Mapping[MemoryKind, float] | None = None) -> dict[MemoryKind, int]:
        """Bytes by kind at the moment of the largest total. A kind in `fractions` counts with that fraction only."""
        fractions = fractions or {}
        held = dict.fromkeys(MemoryKind, 0.0)
        total = largest = 0.0
        at_peak = dict(held)
        for storage, change in self._events:
            kind = self._kinds[storage]
            size = change * self._sizes[storage] * fractions.get(kind, 1.0)
            held[kind] += size
            total += size
            if total > largest:
                largest, at_peak = total, dict(held)
        return {kind: round(size) for kind, size in at_peak.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        known, in_place = len(self._sizes), func._schema.is_mutable
        if _is_sum_of_gradients(func):
            self._move(args[0], result)
            in_place = True
        for tensor in outputs:
            self._id(tensor)
        name = func.name()
        if (len(self._sizes) > known or in_place) and not any(part in name for part in BY_FLOPS):
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.traffic += sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in inputs + outputs)
        return result

    def _id(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        number = self._ids.get(storage._cdata)
        if number is None:
            number = self._ids[storage._cdata] = self._allocated(storage.nbytes(), self.kind)
            weakref.finalize(storage, self._freed, storage._cdata, number)
        return number

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Let `target` take over the storage of `source`: a real autograd adds gradients in place, a fake one does not."""
        number, storage = self._id(source), target.untyped_storage()
        if storage.nbytes() != self._sizes[number]:
            return
        del self._ids[source.untyped_storage()._cdata]
        self._ids[storage._cdata] = number
        weakref.finalize(storage, self._freed, storage._cdata, number)

    def _allocated(self, size: int, kind: MemoryKind) -> int:
        self._kinds.append(kind)
        self._sizes.append(size)
        self._events.append((len(self._sizes) - 1, +1))
        return len(self._sizes) - 1

    def _freed(self, address: int, number: int) -> None:
        if self._ids.get(address) == number:  # unless its storage was taken over
            del self._ids[address]
            self._events.append((number, -1))


def _is_sum_of_gradients(func: Any) -> bool:
    """In a backward pass, additions are autograd summing the gradients of one tensor; its formulas only multiply."""
    return torch._C._current_graph_task_id() != -1 and func is torch.ops.aten.add.Tensor
