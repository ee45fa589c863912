"""Reading named tensors from safetensors files, whole or in part, also those that are stored as fragments.

A tensor that no rank holds whole is stored as fragments: each is a range of the flat tensor, and its key names the tensor,
its shape and where the range begins, as in `layers.0.up.weight/exp_avg:1024x512@65536`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

FRAGMENT = re.compile(r"(.*):((?:\d+(?:x\d+)*)?)@(\d+)", re.DOTALL)


def fragment_key(name: str, shape: Iterable[int], start: int) -> str:
    """Key of the fragment of the flat tensor `name` that begins at element `start`. `shape`: of the whole tensor."""
    return f"{name}:{'x'.join(map(str, shape))}@{start}"


class _Fragment(NamedTuple):
    """Elements `start` to `stop` of a flat tensor: all of the tensor `key` of a file."""

    start: int
    stop: int
    key: str
    file: Any


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of several safetensors files by name; each is read from disk when it is accessed.

    Raises:
        ValueError: The fragments of a tensor leave a gap, or overlap.
    """

    def __init__(self, paths: Iterable[Path]):
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._fragments: dict[str, list[_Fragment]] = {}
        self._files: dict[str, Any] = {}  # of the tensors that are stored whole
        for file in [safe_open(path, "pt") for path in paths]:
            for key in file.keys():  # noqa: SIM118
                self._add(key, file)
        for name, fragments in self._fragments.items():
            fragments.sort(key=lambda fragment: fragment.start)
            ends = [0, *(fragment.stop for fragment in fragments)]
            if [fragment.start for fragment in fragments] != ends[:-1] or ends[-1] != math.prod(self._shapes[name]):
                raise ValueError(f"the fragments of '{name}' are not the whole tensor")

    def shape(self, name: str) -> tuple[int, ...]:
        """Nothing but headers is read."""
        return self._shapes[name]

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of the flat tensor [stop - start]. Little else is read."""
        if name in self._files:
            return _part_of_whole(self._files[name].get_slice(name), self._shapes[name], start, stop)
        parts = [
            f.file.get_slice(f.key)[max(start - f.start, 0) : min(stop, f.stop) - f.start]
            for f in self._fragments[name]
            if f.start < stop and start < f.stop
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._files:
            return self._files[name].get_tensor(name)
        return self.part(name, 0, math.prod(self._shapes[name])).view(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _add(self, key: str, file: Any) -> None:
        shape = tuple(file.get_slice(key).get_shape())
        if not (match := FRAGMENT.fullmatch(key)):
            self._shapes[key], self._files[key] = shape, file
            return
        name, whole, start = match[1], match[2], int(match[3])
        self._shapes[name] = tuple(map(int, whole.split("x"))) if whole else ()
        self._fragments.setdefault(name, []).append(_Fragment(start, start + shape[0], key, file))


def _part_of_whole(stored: Any, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """A range of a flat tensor that is stored whole: the rows that it touches are read."""
    if not shape:
        return stored[...].view(-1)[start:stop]
    width = math.prod(shape[1:])
    first = start // width if width else 0
    rows = stored[first : -(-stop // width) if width else 0]
    return rows.reshape(-1)[start - first * width : stop - first * width]
