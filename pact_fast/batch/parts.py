"""Parts of token trees: splitting trees under a token budget, the cost of parts, and their assignment to packs.

Packs are assigned from a table of costs alone, so that the assigning process does not need the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pact_fast.batch.bins import balance, first_fit
from pact_fast.batch.merge import merge_prefixes
from pact_fast.batch.tree import Node, TokenTree

TreePart = list[Node]  # nodes of one tree in depth-first order; with a node, its parent is in the part, too
Unit = list[TreePart]  # parts that go into the same pack: several where paths that are not shared form a pair


class OwnedPart(NamedTuple):
    """A part, and what its pack accounts for.

    nodes    the nodes, in depth-first order
    sources  position in `nodes` → the caller's nodes that end there; a node that several parts repeat has them once
    """

    nodes: TreePart
    sources: dict[int, list[Node]]


class Assignment(NamedTuple):
    """Which units make up which pack, and who works on it.

    bins   numbers of the units of each pack
    table  [micro-step][rank]: number of the pack
    """

    bins: list[list[int]]
    table: list[list[int]]


def merge_trees(trees: Sequence[TokenTree], merge: bool) -> Sequence[TokenTree]:
    """The trees, with common beginnings of siblings merged (`batch/merge.py`) if `merge`; not those of trees with pairs."""
    return [tree if tree.pairs else merge_prefixes(tree) for tree in trees] if merge else trees


def split_trees(trees: Sequence[TokenTree], max_tokens: int, share: bool) -> list[Unit]:
    """Units of at most `max_tokens` tokens, or of one path or pair of paths; without `share`, every path is a part."""
    if share:
        return [[part] for tree in trees for part in _split(tree, max_tokens)]
    return [
        [leaf.path() for leaf in leaves]
        for tree in trees
        if tree.nodes
        for leaves in _leaf_groups(tree, tree.subtree_sizes())
    ]


def _leaves(tree: TokenTree, sizes: dict[int, int]) -> list[Node]:
    return [node for node in _depth_first(tree.nodes[0], None, sizes) if not node.children]


def _leaf_groups(tree: TokenTree, sizes: dict[int, int]) -> list[list[Node]]:
    """The leaves in depth-first order; those of a pair as one entry, at the place of its first."""
    partner = {id(a): b for pair in tree.pairs for a, b in (pair, pair[::-1])}
    together: list[list[Node]] = []
    placed: set[int] = set()
    for leaf in _leaves(tree, sizes):
        if id(leaf) not in placed:
            together.append([leaf, partner[id(leaf)]] if id(leaf) in partner else [leaf])
            placed |= {id(node) for node in together[-1]}
    return together


def unit_size(unit: Unit) -> int:
    """Tokens of a unit."""
    return sum(len(node.ids) for part in unit for node in part)


def _split(tree: TokenTree, budget: int) -> list[TreePart]:
    """Split a tree by its leaves, in depth-first order, into parts of at most `budget` tokens and at least one leaf.

    Paired leaves are not separated.
    """
    if not tree.nodes:
        return []
    root, subtree_sizes = tree.nodes[0], tree.subtree_sizes()
    if len(tree) <= budget:
        return [_depth_first(root, None, subtree_sizes)]
    parts: list[TreePart] = []
    selected: set[int] = set()
    size = 0
    for leaves in _leaf_groups(tree, subtree_sizes):
        path = list(dict.fromkeys(node for leaf in leaves for node in leaf.path()))
        new = [node for node in path if id(node) not in selected]
        extra = sum(len(node.ids) for node in new)
        if selected and size + extra > budget:
            parts.append(_depth_first(root, selected, subtree_sizes))
            selected, size, new = set(), 0, path
            extra = sum(len(node.ids) for node in new)
        selected |= {id(node) for node in new}
        size += extra
    return [*parts, _depth_first(root, selected, subtree_sizes)]


def _depth_first(root: Node, selected: set[int] | None, subtree_sizes: dict[int, int]) -> TreePart:
    """The selected nodes (all if None) in depth-first order.

    The child with the largest subtree comes first, because the first child extends its parent's causal run.
    """
    order: TreePart = []
    stack = [root]
    while stack:
        node = stack.pop()
        order.append(node)
        children = [c for c in node.children if selected is None or id(c) in selected]
        stack.extend(sorted(children, key=lambda c: subtree_sizes[id(c)]))
    return order


def cost_table(units: Sequence[Unit]) -> np.ndarray:
    """int64 [n, 3]: tokens of each unit, its query-key pairs (a token sees its path and itself), and its longest path."""
    rows = []
    for unit in units:
        nodes = [node for part in unit for node in part]
        pairs = sum(len(node.ids) * node.start + len(node.ids) * (len(node.ids) + 1) // 2 for node in nodes)
        rows.append((unit_size(unit), pairs, max((node.end for node in nodes), default=0)))
    return np.array(rows, np.int64).reshape(-1, 3)


def assign(table: np.ndarray, max_tokens: int, ranks: int, cost: Callable[[int, int], float]) -> Assignment:
    """Packs of at most `max_tokens` tokens (or one unit) for ranks that run in lockstep, balanced by cost.

    Args:
        table: See `cost_table`; the units of all trees.
        max_tokens: Budget of a pack.
        ranks: Number of ranks; a single one gets packs that are as full as possible.
        cost: cost(tokens, pairs) of a unit.
    """
    sizes = table[:, 0].tolist()
    if ranks == 1:
        bins = [sorted(members) for members in first_fit(sizes, max_tokens)]
        return Assignment(bins, [[index] for index in range(len(bins))])
    costs = [cost(tokens, pairs) for tokens, pairs, _ in table.tolist()]
    fewest = -(-len(first_fit(sizes, max_tokens)) // ranks)
    bins = balance(sizes, costs, ranks, fewest, max_tokens)
    bins.sort(key=lambda members: -sum(costs[i] for i in members))  # a step takes as long as its slowest rank
    load = [0.0] * ranks
    steps = []
    for first in range(0, len(bins), ranks):
        row = [0] * ranks
        by_load = sorted(range(ranks), key=load.__getitem__)
        for index, rank in zip(range(first, first + ranks), by_load, strict=True):
            row[rank] = index
            load[rank] += sum(costs[i] for i in bins[index])
        steps.append(row)
    return Assignment([sorted(members) for members in bins], steps)


def claim_nodes(units: Sequence[Unit]) -> list[list[OwnedPart]]:
    """The parts of each unit with the nodes that each of them owns: the first part that has a node owns it."""
    owned: set[int] = set()

    def claim(part: TreePart) -> OwnedPart:
        sources = {index: node.tree.source_nodes(node) for index, node in enumerate(part) if id(node) not in owned}
        owned.update(id(node) for node in part)
        return OwnedPart(part, sources)

    return [[claim(part) for part in unit] for unit in units]
