"""Merging: common beginnings of sibling rollouts are computed once, with the same results."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

from pact_fast.batch import merge as merge_module
from pact_fast.batch.flops import work_of_packs, work_of_paths
from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.components import LossContext
from pact_fast.kernels.head.loss import pact_loss
from pact_fast.train.learner import loss_table_to_tensors
from pact_fast.tree import PackedBatch, PrefixCache, TokenTree, branches_forward, distribute_packs, pack, tree_forward
from tests.support.models import make
from tests.support.trees import alone, cost, gradients, path_ids, weights_of


@pytest.fixture
def eager(monkeypatch):
    """Every common token is merged, however little it saves."""
    monkeypatch.setattr(merge_module, "SPAN_COST", 0)
    monkeypatch.setattr(merge_module, "ROWS_PER_TOKEN", float("inf"))


def alike(seed: int, nodes: int = 14, depth: int = 5) -> TokenTree:
    """A random tree up to `depth` levels deep whose nodes like to begin as their siblings do: empty, with one token, the same,
    one going on where the other ends, or with a first part in common.
    """
    rng = random.Random(seed)
    tree = TokenTree(start=rng.choice([0, 0, 3]))
    tree.add(tokens(rng, 4))
    for _ in range(nodes):
        parent = rng.choice([node for node in tree.nodes if len(node.path()) < depth])
        model = rng.choice(parent.children).ids if parent.children else tokens(rng, 8)
        shared = model[: rng.choice([0, 1, len(model) // 2, len(model), len(model)])]
        tree.add(np.concatenate([shared, tokens(rng, rng.choice([0, 0, 1, 5]))]), parent)
    return tree


def tokens(rng: random.Random, most: int) -> np.ndarray:
    return np.array([rng.randrange(97) for _ in range(rng.randint(0, most))], dtype=np.int64)


def forest(seed: int, trees: int = 3) -> list[TokenTree]:
    return [alike(100 * seed + i) for i in range(trees)]


def prefixes(trees: list[TokenTree]) -> int:
    """Number of distinct beginnings of paths, which full merging computes."""
    count = 0
    for tree in trees:
        paths = [path_ids(leaf).tolist() for leaf in tree.leaves()]
        count += len({tuple(path[: n + 1]) for path in paths for n in range(len(path))})
    return count


def seen_by(batch: PackedBatch, row: int) -> np.ndarray:
    """The rows that attention lets a row see."""
    return np.flatnonzero((np.arange(len(batch)) <= row) & (batch.subtree_end > row))


@pytest.mark.parametrize("seed", range(40))
def test_every_path_is_read_back_through_the_callers_own_nodes(seed, eager):
    trees = forest(seed)
    budget = random.Random(seed).choice([8, 20, 50, 1000])
    batches = pack(trees, max_tokens=budget, merge=True)
    owned = [id(node) for batch in batches for node in batch.owned]
    assert sorted(owned) == sorted(id(node) for tree in trees for node in tree.nodes)
    for batch in batches:
        for node in batch.owned:
            rows, path = batch.rows(node), path_ids(node)
            assert rows.dtype == np.int64 and len(rows) == len(node.ids)
            for i, row in enumerate(rows, start=node.start - node.tree.start):
                assert (row == -1) == (i == 0)
                seen = seen_by(batch, row) if i else []
                assert batch.input_ids[seen].tolist() == path[:i].tolist()
                assert batch.position_ids[seen].tolist() == list(range(node.tree.start, node.tree.start + i))
    if budget == 1000:
        assert sum(map(len, batches)) == prefixes(trees)
        [batch] = batches
        for node in (node for tree in trees for node in tree.nodes):
            rows = batch.path_rows(node)
            assert batch.input_ids[rows].tolist() == path_ids(node).tolist()
            assert batch.position_ids[rows].tolist() == list(range(node.tree.start, node.end))


@pytest.mark.parametrize("seed", range(10))
def test_merging_never_adds_tokens_and_loses_no_node(seed):
    trees = forest(seed)
    batches = pack(trees, max_tokens=1000, merge=True)
    assert prefixes(trees) <= sum(map(len, batches)) <= sum(map(len, trees))
    for batch in batches:
        for node in batch.owned:
            rows = batch.path_rows(node)
            assert batch.input_ids[rows].tolist() == path_ids(node).tolist()


def siblings(*rollouts: list[int]) -> tuple[TokenTree, list]:
    tree = TokenTree()
    root = tree.add([1, 2, 3])
    return tree, [tree.add(ids, root) for ids in rollouts]


def test_identical_rollouts_are_computed_once():
    tree, nodes = siblings(*[list(range(40))] * 3)
    (batch,) = pack([tree], max_tokens=1000, merge=True)
    assert len(batch) == 43 and [node in batch.owned for node in nodes] == [True] * 3
    assert all((batch.rows(node) == np.arange(2, 42)).all() for node in nodes)


def test_children_hang_under_the_end_of_a_node_that_is_merged_in_part(eager):
    tree, (h, y) = siblings([5, 6, 7, 8], [5, 6, 9])
    under = tree.add([4], h)
    (batch,) = pack([tree], max_tokens=1000, merge=True)
    assert batch.input_ids.tolist() == [1, 2, 3, 5, 6, 7, 8, 4, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5]
    assert batch.rows(h).tolist() == [2, 3, 4, 5] and batch.rows(y).tolist() == [2, 3, 4] and batch.rows(under) == 6


def test_a_rollout_merges_with_the_children_of_one_that_is_its_beginning(eager):
    tree, (short, long) = siblings([5, 6], [5, 6, 7, 8])
    under = tree.add([7, 9], short)
    (batch,) = pack([tree], max_tokens=1000, merge=True)
    assert sorted(batch.input_ids.tolist()) == [1, 2, 3, 5, 6, 7, 8, 9]
    assert batch.rows(under).tolist() == batch.rows(long)[2:].tolist() == [4, 5]


def test_a_few_common_tokens_are_not_worth_another_level_of_attention():
    """Unless they belong to the largest child, whose branchings cost no level."""
    rng = np.random.default_rng(0)
    rest = rng.integers(100, 10**6, (4, 1000))
    tree, _ = siblings(*([a, *row] for a, row in zip([1, 1, 2, 2], rest, strict=True)))
    (plain,), (batch,) = (pack([tree], max_tokens=10**5, merge=merge) for merge in (False, True))
    assert len(batch) == len(plain) and len(batch.calls) == len(plain.calls)
    tree, _ = siblings(*([1, *range(20), *row] for row in rest))
    (batch,) = pack([tree], max_tokens=10**5, merge=True)
    assert len(batch) == 3 + 21 + 4000 and len(batch.calls) == len(plain.calls)


def test_parts_of_a_group_have_more_in_common_than_the_whole():
    """Four rollouts share one token, which is not worth it; two and two of them share more."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(100, 200, (2, 50))
    rest = rng.integers(200, 10**6, (4, 60))
    tree, nodes = siblings(*([7, *p, *row] for p, row in zip([first, second] * 2, rest, strict=True)))
    tree.add([8] * 2000, tree.nodes[0])  # the largest child is another one
    (batch,) = pack([tree], max_tokens=10**5, merge=True)
    assert len(batch) == len(tree) - 2 * 51
    for node in nodes:
        assert batch.input_ids[batch.path_rows(node)].tolist() == path_ids(node).tolist()


def test_without_sharing_nothing_is_merged():
    trees = forest(0)
    alone = pack(trees, max_tokens=100, share=False, merge=True)
    assert work_of_packs(alone) == work_of_paths(trees)


def test_merging_leaves_the_callers_tree_alone(eager):
    tree = alike(3)
    before = [(id(n), n.ids.tolist(), id(n.parent), [id(c) for c in n.children]) for n in tree.nodes]
    pack([tree], max_tokens=10, merge=True)
    assert before == [(id(n), n.ids.tolist(), id(n.parent), [id(c) for c in n.children]) for n in tree.nodes]


@pytest.mark.parametrize("seed", range(12))
def test_distributed_packs_hold_every_node_once_and_their_work_is_that_of_the_merged_layout(seed, eager):
    trees = forest(seed, trees=5)
    ranks = 2 + seed % 2
    table = distribute_packs(trees, max_tokens=60, ranks=ranks, cost=cost, merge=True)
    assert all(len(row) == ranks for row in table)
    packs = [batch for row in table for batch in row]
    owned = [id(node) for batch in packs for node in batch.owned]
    assert sorted(owned) == sorted(id(node) for tree in trees for node in tree.nodes)
    pairs = sum(len(seen_by(batch, row)) for batch in packs for row in range(len(batch)))
    assert work_of_packs(packs) == (sum(map(len, packs)), pairs)
    plain = distribute_packs(trees, max_tokens=60, ranks=ranks, cost=cost)
    assert work_of_packs(packs).tokens < work_of_packs([batch for row in plain for batch in row]).tokens


def merged_total(model, trees: list[TokenTree], budget: int, merge: bool = True) -> torch.Tensor:
    """test_tree_models.as_tree over merged packs."""
    weights, total = weights_of(trees), torch.zeros((), dtype=torch.float64)
    for batch in pack(trees, max_tokens=budget, merge=merge):
        hidden = tree_forward(model, batch)
        for node in batch.owned:
            rows = batch.rows(node)
            keep = rows >= 0
            total = total + (hidden[rows[keep]].double().sum(-1) * weights[id(node)][keep]).sum()
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("budget", [30, 1000])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_parameter_gradients_equal_those_without_merging(kind, budget, dtype, eager):
    model, trees = make(kind).to(dtype), [tree for tree in forest(1, 6) if tree.start == 0]
    ours = gradients(model, merged_total(model, trees, budget))
    plain = gradients(model, merged_total(model, trees, budget, merge=False))
    theirs = gradients(model, alone(model, trees))
    assert (ours - plain).norm() <= 2e-6 * plain.norm()
    assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_hidden_states_equal_those_without_merging(kind, eager):
    model, trees = make(kind).float(), forest(2)
    (ours,), (plain,) = (pack(trees, max_tokens=1000, merge=merge) for merge in (True, False))
    assert len(ours) < 0.8 * len(plain)
    with torch.no_grad():
        given, wanted = (
            torch.cat([hidden[batch.path_rows(node)] for tree in trees for node in tree.nodes])
            for batch, hidden in ((b, tree_forward(model, b)) for b in (ours, plain))
        )
    assert (given - wanted).norm() <= 2e-6 * wanted.norm()


def scored_of(trees: list[TokenTree], seed: int) -> list[ScoredTokens]:
    """Some tokens of every node, with weights of both losses; the same tokens of siblings get different ones."""
    rng = np.random.default_rng(seed)
    scored = []
    for tree in trees:
        for node in tree.nodes[1:]:
            index = np.flatnonzero(rng.random(len(node.ids)) < 0.8)
            m, unknown = len(index), np.full(len(index), np.nan, np.float32)
            scored.append(ScoredTokens(
                node, rng.choice(list(LossContext)), prompt=0, rollout=len(scored), index=index,
                component=rng.integers(1, 4, m), advantage=rng.normal(size=m).astype(np.float32), rl_weight=rng.random(m),
                sft_weight=rng.random(m), sampler_logprob=unknown, old_logprob=unknown, ref_logprob=unknown,
                importance=np.ones(m),
            ))  # fmt: skip
    return scored


@pytest.mark.parametrize("budget", [25, 1000])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_loss_and_gradients_equal_those_without_merging(kind, budget, eager):
    model = make(kind).float()
    trees = [tree for tree in forest(4, 8) if tree.start == 0 and len(tree.nodes[0].ids)]
    scored = scored_of(trees, 0)
    results = []
    for merge in (True, False):
        total, count, rows = torch.zeros((), dtype=torch.float64), 0, set()
        for index, batch in enumerate(pack(trees, max_tokens=budget, merge=merge)):
            table, _ = loss_table_to_tensors(batch, scored)
            if len(table):
                out = pact_loss(tree_forward(model, batch), model.lm_head.weight, table, entropy_coef=0.01)
                total = total + out.loss.double()
            count += len(table)
            rows |= {(index, *pair) for pair in zip(table.row.tolist(), table.target.tolist(), strict=True)}
        results.append((float(total.detach()), gradients(model, total), count, len(rows)))
    (loss, gradient, count, rows), (expected, wanted, all_of_them, more) = results
    assert count == all_of_them == sum(len(s.index) for s in scored) and rows < more <= count
    assert loss == pytest.approx(expected, rel=2e-6)
    assert (gradient - wanted).norm() <= 2e-6 * wanted.norm()


def test_branches_over_a_kept_path_that_is_merged(eager):
    model = make("qwen3")
    tree, (h, _) = siblings([5, 6, 7, 8], [5, 6, 9])
    under = tree.add([4, 11], h)
    (whole,) = pack([tree], max_tokens=100, merge=True)
    cache = PrefixCache(whole, h)
    full = tree_forward(model, whole, keep=cache)
    teacher = TokenTree(start=len(cache))
    stem = teacher.add([])
    node, _ = teacher.add([4, 11], stem), teacher.add([4, 12], stem)
    (branches,) = pack([teacher], max_tokens=100, merge=True)
    assert len(branches) == 3
    hidden = branches_forward(model, cache, branches)
    torch.testing.assert_close(hidden[branches.rows(node)], full[whole.rows(under)].detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.timing
@pytest.mark.slow
def test_many_long_rollouts_are_packed_quickly():
    """256 prompts with 8 rollouts of 1000 tokens; on an idle core 30 ms without merging, 90 ms with it."""
    rng = np.random.default_rng(0)
    trees = []
    for _ in range(256):
        tree = TokenTree()
        root = tree.add(rng.integers(0, 50000, 300))
        first = rng.integers(0, 50000, 1000)
        for cut in rng.integers(0, 1000, 8):
            tree.add(np.concatenate([first[:cut], rng.integers(0, 50000, 1000 - cut)]), root)
        trees.append(tree)
    for merge, limit in ((False, 0.05), (True, 0.1)):
        seconds = []
        for _ in range(5):
            started = time.process_time()
            batches = pack(trees, max_tokens=16384, merge=merge)
            seconds.append(time.process_time() - started)
        assert min(seconds) < 3 * limit  # a busy machine is slower
    assert sum(map(len, batches)) < 0.7 * sum(map(len, trees))
