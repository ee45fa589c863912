"""Which memory a computation holds at each moment, read off the operators that run, on tensors that have none.

Below FakeTensorMode an operator makes results without contents. This mode, which lies above it, notes the size of every
new storage and the moment at which it is freed. The record is replayed afterwards, when it is known what became a
gradient and what was only passing through, and may be replayed with shares: a device that holds a part of the gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BY_FLOPS = ("mm", "attention", "empty")  # in names of operators whose time is not that of their memory traffic


class MemoryKind(Enum):
    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer states"
    ACTIVATIONS = "activations"
    HEAD = "head buffers"


class MemoryTracker(TorchDispatchMode):
    """A context for what is to be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = MemoryKind.ACTIVATIONS  # of storages made from now on
        self.traffic = 0  # bytes that operators other than matrix products and attention read and write
        self._keys: dict[int, int] = {}  # address of a living storage → its number
        self._kinds: list[MemoryKind] = []
        self._sizes: list[int] = []
        self._events: list[tuple[int, int]] = []  # (number, +1 made, −1 freed), in order of time

    def add(self, tensors: Iterable[torch.Tensor], kind: MemoryKind) -> None:
        """These are of this kind, from when they were made; new ones exist from now on."""
        for tensor in tensors:
            self._kinds[self._number(tensor)] = kind

    def peak(self, shares: Mapping[MemoryKind, float] | None = None) -> dict[MemoryKind, int]:
        """Bytes by kind at the moment when their sum is largest; of a kind in `shares` only that part counts."""
        shares = shares or {}
        held = dict.fromkeys(MemoryKind, 0.0)
        total = most = 0.0
        best = dict(held)
        for number, change in self._events:
            kind = self._kinds[number]
            bytes_ = change * self._sizes[number] * shares.get(kind, 1.0)
            held[kind] += bytes_
            total += bytes_
            if total > most:
                most, best = total, dict(held)
        return {kind: round(bytes_) for kind, bytes_ in best.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        known, in_place = len(self._sizes), func._schema.is_mutable
        if _is_sum_of_gradients(func):
            self._move(args[0], result)
            in_place = True
        for tensor in outputs:
            self._number(tensor)
        name = func.name()
        if (len(self._sizes) > known or in_place) and not any(part in name for part in BY_FLOPS):
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.traffic += sum(min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in inputs + outputs)
        return result

    def _number(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        number = self._keys.get(storage._cdata)
        if number is None:
            number = self._keys[storage._cdata] = self._made(storage.nbytes(), self.kind)
            weakref.finalize(storage, self._freed, storage._cdata, number)
        return number

    def _move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """The target lies where the source did: autograd adds in place, but not on tensors without contents."""
        number, storage = self._number(source), target.untyped_storage()
        if storage.nbytes() != self._sizes[number]:
            return
        del self._keys[source.untyped_storage()._cdata]
        self._keys[storage._cdata] = number
        weakref.finalize(storage, self._freed, storage._cdata, number)

    def _made(self, size: int, kind: MemoryKind) -> int:
        self._kinds.append(kind)
        self._sizes.append(size)
        self._events.append((len(self._sizes) - 1, +1))
        return len(self._sizes) - 1

    def _freed(self, address: int, number: int) -> None:
        if self._keys.get(address) == number:  # and nothing has taken its place
            del self._keys[address]
            self._events.append((number, -1))


def _is_sum_of_gradients(func: Any) -> bool:
    """Sums in a backward pass are autograd's, of gradients that meet; its formulas multiply."""
    return torch._C._current_graph_task_id() != -1 and func is torch.ops.aten.add.Tensor
