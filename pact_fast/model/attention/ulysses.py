"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509).

Every rank of a group computes a slice of a pack's rows; in attention it computes a part of the heads over all rows. One
all-to-all before attention turns slices of rows into slices of heads, one after it turns them back. Attention itself
sees whole packs, so tree attention needs no change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pact_fast.errors import PactError

Exchange = Callable[[torch.Tensor], torch.Tensor]


class RowShards:
    """Division of the T rows of a pack among the P ranks of `group`.

    group   process group
    rank    this rank's number in the group
    size    P
    counts  number of rows of each rank
    start   first row of this rank
    end     row after the last one of this rank
    """

    def __init__(self, group: dist.ProcessGroup, rows: int):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.counts = [(p + 1) * rows // self.size - p * rows // self.size for p in range(self.size)]
        self.start = sum(self.counts[: self.rank])
        self.end = self.start + self.counts[self.rank]

    def scatter_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All heads of this rank's rows → this rank's heads over all rows: [1, H, t, D] → [1, H/P, T, D] each.

        With fewer key heads than ranks, several ranks get the same key head. Raises PactError if P does not divide the
        number of query heads.
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
        return tuple(_Exchange.apply(t, self._rows_to_heads, self._heads_to_rows) for t in (q, k, v))

    def gather_heads(self, out: torch.Tensor) -> torch.Tensor:
        """This rank's heads over all rows → all heads of this rank's rows: [1, H/P, T, D] → [1, H, t, D]."""
        return _Exchange.apply(out, self._heads_to_rows, self._rows_to_heads)

    def _rows_to_heads(self, x: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = x.shape
        per_row = heads // self.size * width  # elements of one row that go to one rank
        send = x[0].contiguous().flatten()  # heads outermost: the data for one rank is contiguous
        receive_sizes = [per_row * count for count in self.counts]
        parts = self._all_to_all(send, [per_row * self.counts[self.rank]] * self.size, receive_sizes)
        return torch.cat([p.view(heads // self.size, -1, width) for p in parts], dim=1)[None]

    def _heads_to_rows(self, x: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = x.shape
        parts = [part.flatten() for part in x[0].split(self.counts, dim=1)]
        receive_size = heads * self.counts[self.rank] * width
        received = self._all_to_all(torch.cat(parts), [len(part) for part in parts], [receive_size] * self.size)
        return torch.cat([p.view(heads, -1, width) for p in received])[None]

    def _all_to_all(
        self, send: torch.Tensor, send_sizes: list[int], receive_sizes: list[int]
    ) -> tuple[torch.Tensor, ...]:
        received = send.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=self.group)
        return received.split(receive_sizes)


class _Exchange(torch.autograd.Function):
    """Applies `exchange`; the gradient goes through `inverse`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: Exchange, inverse: Exchange) -> torch.Tensor:
        ctx.inverse = inverse
        return exchange(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.inverse(grad), None, None
