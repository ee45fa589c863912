"""Sequence parallelism: every process computes its slice of a pack's rows, and attention some of the heads over all rows.

DeepSpeed-Ulysses (arXiv 2309.14509): one all-to-all before attention turns row_shards into heads, one after it turns them back.
Attention itself sees whole packs, so tree attention needs no change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pact_fast.errors import PactError

Move = Callable[[torch.Tensor], torch.Tensor]


class RowShards:
    """How the T rows of a pack lie on the processes of `group`; process `rank` of it holds rows [start, end)."""

    def __init__(self, group: dist.ProcessGroup, rows: int):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.counts = [(p + 1) * rows // self.size - p * rows // self.size for p in range(self.size)]
        self.start = sum(self.counts[: self.rank])
        self.end = self.start + self.counts[self.rank]

    def heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """This process's share of the heads over all rows: [1, H, t, D] → [1, H/P, T, D] each.

        Where processes outnumber key heads, several of them get the same one.
        """
        if q.shape[1] % self.size:
            raise PactError(
                f"trainer.sequence_parallel_size={self.size} does not divide the model's {q.shape[1]} attention heads"
            )
        copies = self.size // math.gcd(self.size, k.shape[1])
        if q.shape[1] % (k.shape[1] * copies):
            copies = q.shape[1] // k.shape[1]
        if copies > 1:
            k, v = (t.repeat_interleave(copies, dim=1) for t in (k, v))
        return tuple(_Exchange.apply(t, self.to_heads, self.to_rows) for t in (q, k, v))

    def rows(self, out: torch.Tensor) -> torch.Tensor:
        """All heads of this process's rows: [1, H/P, T, D] → [1, H, t, D]."""
        return _Exchange.apply(out, self.to_rows, self.to_heads)

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = x.shape
        part = heads // self.size * width
        sent = x[0].contiguous().flatten()  # head by head: what goes to one process lies together
        sizes = [part * count for count in self.counts]
        parts = self._exchange(sent, [part * self.counts[self.rank]] * self.size, sizes)
        return torch.cat([p.view(heads // self.size, -1, width) for p in parts], dim=1)[None]

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = x.shape
        parts = [part.flatten() for part in x[0].split(self.counts, dim=1)]
        mine = heads * self.counts[self.rank] * width
        received = self._exchange(torch.cat(parts), [len(part) for part in parts], [mine] * self.size)
        return torch.cat([p.view(heads, -1, width) for p in received])[None]

    def _exchange(self, sent: torch.Tensor, to: list[int], of: list[int]) -> tuple[torch.Tensor, ...]:
        received = sent.new_empty(sum(of))
        dist.all_to_all_single(received, sent, of, to, group=self.group)
        return received.split(of)


class _Exchange(torch.autograd.Function):
    """`there` forward, `back` for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Move, back: Move) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(grad), None, None
