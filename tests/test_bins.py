"""Parts into bins: the same as the quadratic loops over all bins, in the time of sorting."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pact_fast.batch.bins import balance, first_fit
from pact_fast.tree import TokenTree, pack

sizes = st.lists(st.integers(0, 60), max_size=40)


def first_fit_by_hand(sizes: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        target = next((b for b, room in enumerate(free) if sizes[index] <= room), None)
        if target is None:
            target = len(bins)
            bins.append([])
            free.append(max(capacity, sizes[index]))
        bins[target].append(index)
        free[target] -= sizes[index]
    return bins


def balance_by_hand(sizes, costs, count, capacity) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(count)]
    load, tokens = [0.0] * count, [0] * count
    for index in sorted(range(len(sizes)), key=lambda i: -costs[i]):
        candidates = [b for b in range(count) if not bins[b] or tokens[b] + sizes[index] <= capacity]
        if not candidates:
            return None
        target = min(candidates, key=load.__getitem__)
        bins[target].append(index)
        load[target] += costs[index]
        tokens[target] += sizes[index]
    return bins


@given(sizes, st.integers(1, 100))
def test_first_fit_is_that_of_a_loop_over_all_bins(sizes, capacity):
    assert first_fit(sizes, capacity) == first_fit_by_hand(sizes, capacity)


@given(sizes, st.integers(1, 4), st.integers(0, 6), st.integers(20, 200), st.randoms())
def test_balancing_is_that_of_a_loop_over_all_bins_and_opens_steps_where_that_fails(sizes, ranks, steps, capacity, rng):
    costs = [rng.random() * size for size in sizes]
    bins = balance(sizes, costs, ranks, steps, capacity)
    by_hand = balance_by_hand(sizes, costs, ranks * steps, capacity)
    if by_hand is not None:
        assert bins == by_hand
    assert len(bins) % ranks == 0
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    for members in bins:
        total = sum(sizes[i] for i in members)
        assert (
            total <= capacity or len([i for i in members if sizes[i]]) == 1 or total <= max(sizes[i] for i in members)
        )


def seconds(n: int) -> float:
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(6, 1, n), 16_000).astype(int).tolist()
    start = time.process_time()
    fewest = -(-len(first_fit(sizes, 16_384)) // 8)
    balance(sizes, [float(size) ** 1.2 for size in sizes], 8, fewest, 16_384)
    return time.process_time() - start


@pytest.mark.timing
def test_time_grows_as_that_of_sorting():
    """Quadratic, four times the parts would take sixteen times as long."""
    few, many = (min(seconds(n) for _ in range(3)) for n in (4_000, 16_000))
    assert many < 8 * few


@pytest.mark.timing
def test_paths_without_sharing_take_time_in_proportion_to_their_nodes():
    def measured(nodes: int) -> float:
        rng = np.random.default_rng(0)
        tree = TokenTree()
        made = [tree.add([1])]
        for _ in range(nodes):
            made.append(tree.add([1, 2], made[int(rng.integers(len(made)))]))
        start = time.process_time()
        pack([tree], max_tokens=10_000, share=False)
        return time.process_time() - start

    few, many = (min(measured(n) for _ in range(2)) for n in (1_000, 4_000))
    assert many < 10 * few
