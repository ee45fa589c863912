"""Detached keys and values of one path of a tree, on which branches without gradient are computed."""

from __future__ import annotations

import torch

from pact_fast.batch.packing import PackedBatch
from pact_fast.batch.tree import Node


class PrefixCache:
    """Keys and values of the path that ends with `node`.

    `tree_forward(model, batch, keep=cache)` fills it, `branches_forward(model, cache, …)` reads it.
    """

    def __init__(self, batch: PackedBatch, node: Node):
        self.rows = torch.as_tensor(batch.path_rows(node))  # int64 [n] rows of the path's tokens in the pack
        self.last_hidden = torch.empty(0)  # [D] hidden state of the path's last token
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        """Number of tokens of the path."""
        return len(self.rows)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the path's rows of key, value [1, Hkv, T, D] of the whole pack."""
        rows = self.rows.to(key.device)
        self._layers[layer] = key.detach()[:, :, rows], value.detach()[:, :, rows]

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The path's keys and values, followed by `key` and `value` [1, Hkv, T, D]: each [1, Hkv, n + T, D]."""
        path_key, path_value = self._layers[layer]
        return torch.cat([path_key, key], 2), torch.cat([path_value, value], 2)
