"""Parts into bins: first-fit decreasing, and balancing by cost, both in O(n log n) for n parts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: the largest part first, each into the first bin with room for it.

    Args:
        sizes: Tokens of each part.
        capacity: Tokens of a bin. A larger part gets a bin of its own.

    Returns:
        Indices of the parts in each bin.
    """
    bins: list[list[int]] = []
    free = _LargestFree(len(sizes))
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        target = free.first_with(size)
        if target is None:
            target = len(bins)
            bins.append([])
            free.set(target, max(capacity, size))
        bins[target].append(index)
        free.set(target, free.get(target) - size)
    return bins


def balance(
    sizes: Sequence[int], costs: Sequence[float], ranks: int, fewest_steps: int, capacity: int
) -> list[list[int]]:
    """Greedy balancing: the most expensive part first, each into the cheapest bin that can hold it.

    A part that fits into no bin opens the bins of one more step.

    Args:
        sizes: Tokens of each part.
        costs: Cost of each part.
        ranks: Bins of a step.
        fewest_steps: Steps to begin with.
        capacity: Tokens of a bin; a larger part gets a bin of its own.

    Returns:
        Indices of the parts in each bin; the number of bins is a multiple of `ranks`.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    by_cost: list[tuple[float, int]] = []  # (cost, bin), of those that a part may fit into
    too_full: list[
        tuple[int, float, int]
    ] = []  # (−free tokens, cost, bin): had no room for a part; for a smaller one, perhaps

    def open_step() -> None:
        for _ in range(ranks):
            heapq.heappush(by_cost, (0.0, len(bins)))
            bins.append([])
            free.append(capacity)

    for _ in range(fewest_steps):
        open_step()
    for index in sorted(range(len(sizes)), key=lambda i: -costs[i]):
        size = sizes[index]
        while too_full and -too_full[0][0] >= size:
            _, cost, target = heapq.heappop(too_full)
            heapq.heappush(by_cost, (cost, target))
        while by_cost and bins[by_cost[0][1]] and free[by_cost[0][1]] < size:
            cost, target = heapq.heappop(by_cost)
            heapq.heappush(too_full, (-free[target], cost, target))
        if not by_cost:
            open_step()
        cost, target = heapq.heappop(by_cost)
        bins[target].append(index)
        free[target] -= size
        heapq.heappush(by_cost, (cost + costs[index], target))
    return bins


class _LargestFree:
    """Free room of bins, in a binary tree of maxima that finds the first bin with enough of it."""

    def __init__(self, count: int):
        self._leaves = 1 << max(count - 1, 0).bit_length()
        self._largest = [-1] * (2 * self._leaves)

    def get(self, index: int) -> int:
        return self._largest[self._leaves + index]

    def set(self, index: int, free: int) -> None:
        node = self._leaves + index
        self._largest[node] = free
        while node > 1:
            node //= 2
            self._largest[node] = max(self._largest[2 * node], self._largest[2 * node + 1])

    def first_with(self, size: int) -> int | None:
        if self._largest[1] < size:
            return None
        node = 1
        while node < self._leaves:
            node *= 2
            node += self._largest[node] < size
        return node - self._leaves
