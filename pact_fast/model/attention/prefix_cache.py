"""Detached keys and values of one path of a tree, for branches that take no gradient."""

from __future__ import annotations

import torch

from pact_fast.batch.packing import PackedBatch
from pact_fast.batch.tree import Node


class PathCache:
    """Filled by tree_forward(model, batch, keep=cache), used by branches_forward. `node`: where the path ends."""

    def __init__(self, batch: PackedBatch, node: Node):
        self.rows = torch.as_tensor(batch.path_rows(node))
        self.last_hidden = torch.empty(0)  # [D], of the path's last token
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """key, value [1, Hkv, T, D] of the whole pack."""
        rows = self.rows.to(key.device)
        self._layers[layer] = key.detach()[:, :, rows], value.detach()[:, :, rows]

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The path's keys and values, and behind them those given."""
        kept_key, kept_value = self._layers[layer]
        return torch.cat([kept_key, key], 2), torch.cat([kept_value, value], 2)
