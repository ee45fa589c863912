"""distribute_packs: every node in exactly one pack, equally many packs on every rank, and about the same work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pact_fast.batch.flops import work_of_packs
from pact_fast.tree import TokenTree, distribute_packs
from tests.support.trees import cost


def forest(seed: int, prompts: int, rollouts: int = 4) -> list[TokenTree]:
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(prompts):
        tree = TokenTree()
        root = tree.add(np.arange(rng.integers(5, 60)))
        for _ in range(rng.integers(1, rollouts + 1)):
            tree.add(np.arange(rng.integers(1, 90)), root)
        trees.append(tree)
    return trees


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5), st.sampled_from([40, 150, 400, 10_000]))
@settings(max_examples=150, deadline=None)
def test_every_node_is_in_one_pack_and_all_ranks_have_equally_many_packs(seed, prompts, ranks, budget):
    trees = forest(seed, prompts)
    table = distribute_packs(trees, max_tokens=budget, ranks=ranks, cost=cost)
    assert all(len(row) == ranks for row in table)
    packs = [batch for row in table for batch in row]
    assert len({id(batch) for batch in packs}) == len(packs)
    owned = [id(node) for batch in packs for node in batch.owned]
    assert sorted(owned) == sorted(id(node) for tree in trees for node in tree.nodes)
    longest = max(leaf.end for tree in trees for leaf in tree.leaves())
    assert all(len(batch) <= max(budget, longest) for batch in packs)
    leaves = sum(len(list(tree.leaves())) for tree in trees)
    assert sum(len(batch) > 0 for batch in packs) >= min(ranks, leaves)  # trees are cut before anybody idles


def test_every_rank_computes_the_same_packs():
    """Ranks compute the distribution each for itself, without communication."""
    tables = [distribute_packs(forest(3, 20), max_tokens=500, ranks=4, cost=cost) for _ in range(2)]
    ids = [[[batch.input_ids.tolist() for batch in row] for row in table] for table in tables]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_about_the_same_work(ranks):
    table = distribute_packs(forest(0, 256, rollouts=8), max_tokens=2000, ranks=ranks, cost=cost)
    costs = np.array([[cost(*work_of_packs([batch])) for batch in row] for row in table])
    assert costs.sum(0).max() <= 1.02 * costs.sum(0).mean()  # over the whole update
    assert costs.max(1).sum() <= 1.08 * costs.mean(1).sum()  # and where all wait for the slowest in each step


def test_packs_are_as_few_as_the_ranks_allow():
    trees = forest(1, 64)
    tokens = sum(len(tree) for tree in trees)
    table = distribute_packs(trees, max_tokens=1000, ranks=4, cost=cost)
    assert len(table) <= -(-tokens // 4000) + 1
