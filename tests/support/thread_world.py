"""Ranks as threads of this process; their messages are encoded and decoded as between processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from pact_fast.distributed.serialization import decode, encode
from pact_fast.distributed.world import World

T = TypeVar("T")


class Hub:
    """Exchange point of the ranks. bytes_to: bytes that each rank has received."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=300)
        self.slots: list[Any] = [None] * size
        self.bytes_to = [0] * size

    def share(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks."""
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank of `run_threads`."""

    hub: Hub = field(kw_only=True)

    def all_gather(self, value: Any, what: str = "data") -> list[Any]:
        return [self._decode(part) for part in self.hub.share(self.rank, encode(value))]

    def all_to_all(self, values: Any, what: str = "data") -> list[Any]:
        sent = [None if value is None or r == self.rank else encode(value) for r, value in enumerate(values)]
        parts = [row[self.rank] for row in self.hub.share(self.rank, sent)]
        return [values[r] if r == self.rank else part and self._decode(part) for r, part in enumerate(parts)]

    def all_reduce_sum(self, values: torch.Tensor, what: str = "statistics") -> torch.Tensor:
        return torch.stack(self.hub.share(self.rank, values.detach().double().clone())).sum(0)

    def _decode(self, part: bytes) -> Any:
        self.hub.bytes_to[self.rank] += len(part)
        return decode(part)


def run_threads(work: Callable[[World], T], size: int, sequence_parallel: int = 1, hub: Hub | None = None) -> list[T]:
    """`work(world)` of every rank; the results by rank. An error of a rank is raised here."""
    hub = hub or Hub(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadWorld(rank, size, 0, sequence_parallel, hub=hub))
        except BaseException:
            hub.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))  # a consequence of another one
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
