"""Packing: token trees laid out in rows of at most a budget of tokens.

A pack is one row of tokens in depth-first order. In that order the tokens that may see token k are exactly those from k
to the end of k's subtree, so that `subtree_end` [T] is the whole attention mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pact_fast.batch.bins import balance, first_fit
from pact_fast.batch.merge import merge_prefixes
from pact_fast.batch.tree import Node, TokenTree


class Span(NamedTuple):
    """Query rows [q0, q1) that see key rows [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int


class Call(NamedTuple):
    """One dense (variable-length) attention call.

    spans   in order of their query rows; no query row is in two spans of a call
    causal  True: each span's queries are its own keys, seen causally. False: queries see the whole key range
    """

    spans: list[Span]
    causal: bool

    def contiguous_rows(self) -> slice | None:
        """The query rows of all spans as one slice, or None if there is a gap between two spans."""
        gaps = any(a.q1 != b.q0 for a, b in itertools.pairwise(self.spans))
        return None if gaps else slice(self.spans[0].q0, self.spans[-1].q1)


@dataclass
class PackedBatch:
    """Trees in one row of T tokens.

    input_ids     int64 [T]
    position_ids  int64 [T] position of each token in its own sequence
    subtree_end   int64 [T] the attention mask: row k is seen by rows k ≤ q < subtree_end[k]
    calls         the same mask as dense attention calls. The first is causal and covers every row; each of the others
                  adds the keys of one more level of ancestors
    owned         nodes whose tokens this pack accounts for; a node that splitting repeats is owned by one pack only
    _rows         id(owned node) → (rows of its tokens as ranges, the row before them)
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_end: np.ndarray
    calls: list[Call]
    owned: list[Node]
    _rows: dict[int, tuple[list[range], int]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, node: Node) -> np.ndarray:
        """int64 [n]: for each token of an owned node, the hidden row that predicts it.

        This is the row before the token on its path. The first token of a root has no predecessor; its row is −1.
        """
        ranges, previous = self._rows[id(node)]
        return _concat_ranges([range(previous, previous + 1), *ranges])[:-1]

    def path_rows(self, node: Node) -> np.ndarray:
        """int64 [n]: the row of every token on the path to a node, all of whose nodes this pack must own."""
        return _concat_ranges([part for n in node.path() for part in self._rows[id(n)][0]])


def pack(trees: Sequence[TokenTree], *, max_tokens: int, share: bool = True, merge: bool = False) -> list[PackedBatch]:
    """Pack trees by first-fit decreasing: largest first, each into the first pack with enough free tokens.

    Args:
        trees: The trees. They are not changed.
        max_tokens: Budget of a pack. A larger tree is split by its leaves into parts that repeat the shared path. A
            single path (or pair of leaves) over the budget gets a pack of its own; nothing is ever truncated.
        share: False gives every root-to-leaf path its own copy of all tokens: the same results without prefix sharing.
        merge: Whether siblings that begin with the same tokens share these, too (`batch/merge.py`). Rows, ownership and
            results are still those of the caller's nodes. Trees with pairs are left as they are.
    """
    units = _split_trees(_merge_trees(trees, share and merge), max_tokens, share)
    bins = first_fit([_num_tokens(unit) for unit in units], max_tokens)
    return _build_packs([[part for i in sorted(members) for part in units[i]] for members in bins])


def distribute_packs(
    trees: Sequence[TokenTree],
    *,
    max_tokens: int,
    ranks: int,
    cost: Callable[[int, int], float],
    share: bool = True,
    merge: bool = False,
) -> list[list[PackedBatch]]:
    """Packs for ranks that run in lockstep, balanced by cost. Every rank computes the same result.

    With too few trees for all ranks, trees are split further than the budget requires (and repeat their shared path); a
    rank that still has none gets an empty pack.

    Args:
        trees: The trees of an optimizer step.
        max_tokens: Budget of a pack, see `pack`.
        ranks: Number of ranks.
        cost: cost(tokens, pairs) of a part of a tree; its arguments are those of `batch.flops.Work`.
        share: See `pack`.
        merge: See `pack`.

    Returns:
        packs[step][rank]. The packs of a step cost about the same.
    """
    if ranks == 1:
        return [[batch] for batch in pack(trees, max_tokens=max_tokens, share=share, merge=merge)]
    trees = _merge_trees(trees, share and merge)
    units = _split_trees(trees, max_tokens, share)
    budget = max_tokens
    while share and len(units) < ranks and budget > 1:
        budget //= 2
        units = _split_trees(trees, budget, share)
    costs = [cost(*_tokens_and_pairs(unit)) for unit in units]
    sizes = [_num_tokens(unit) for unit in units]
    fewest = -(-len(first_fit(sizes, max_tokens)) // ranks)
    bins = balance(sizes, costs, ranks, fewest, max_tokens)
    bins.sort(key=lambda members: -sum(costs[i] for i in members))  # a step takes as long as its slowest rank
    batches = _build_packs([[part for i in sorted(members) for part in units[i]] for members in bins])
    load = [0.0] * ranks
    table = []
    for step in range(len(bins) // ranks):
        row: list[PackedBatch] = [batches[0]] * ranks
        by_load = sorted(range(ranks), key=load.__getitem__)
        for index, rank in zip(range(step * ranks, (step + 1) * ranks), by_load, strict=True):
            row[rank] = batches[index]
            load[rank] += sum(costs[i] for i in bins[index])
        table.append(row)
    return table


TreePart = list[Node]  # nodes of one tree in depth-first order; with a node, its parent is in the part, too
Unit = list[TreePart]  # parts that go into the same pack


def _merge_trees(trees: Sequence[TokenTree], merge: bool) -> Sequence[TokenTree]:
    return [tree if tree.pairs else merge_prefixes(tree) for tree in trees] if merge else trees


def _split_trees(trees: Sequence[TokenTree], max_tokens: int, share: bool) -> list[Unit]:
    if share:
        return [[part] for tree in trees for part in _split(tree, max_tokens)]
    return [
        [leaf.path() for leaf in leaves]
        for tree in trees
        if tree.nodes
        for leaves in _leaves_together(tree, tree.subtree_sizes())
    ]


def _leaves(tree: TokenTree, sizes: dict[int, int]) -> list[Node]:
    return [node for node in _depth_first(tree.nodes[0], None, sizes) if not node.children]


def _leaves_together(tree: TokenTree, sizes: dict[int, int]) -> list[list[Node]]:
    """The leaves in depth-first order; those of a pair as one entry, at the place of its first."""
    partner = {id(a): b for pair in tree.pairs for a, b in (pair, pair[::-1])}
    together: list[list[Node]] = []
    placed: set[int] = set()
    for leaf in _leaves(tree, sizes):
        if id(leaf) not in placed:
            together.append([leaf, partner[id(leaf)]] if id(leaf) in partner else [leaf])
            placed |= {id(node) for node in together[-1]}
    return together


def _num_tokens(unit: Unit) -> int:
    return sum(len(node.ids) for part in unit for node in part)


def _tokens_and_pairs(unit: Unit) -> tuple[int, int]:
    """(tokens, query-key pairs): a token sees its path up to and including itself."""
    nodes = [node for part in unit for node in part]
    pairs = sum(len(node.ids) * node.start + len(node.ids) * (len(node.ids) + 1) // 2 for node in nodes)
    return _num_tokens(unit), pairs


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
    for leaves in _leaves_together(tree, subtree_sizes):
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


def _build_packs(packs: list[list[TreePart]]) -> list[PackedBatch]:
    owned: set[int] = set()
    return [_build_pack(parts, owned) for parts in packs]


def _build_pack(parts: list[TreePart], already_owned: set[int]) -> PackedBatch:
    """Concatenate parts of trees. Two parts may repeat a node, so row numbers are kept per part.

    `already_owned` holds id(node) of the nodes that earlier packs own; those of this pack are added.
    """
    rows: dict[int, tuple[list[range], int]] = {}
    owned: list[Node] = []
    runs: list[Span] = []
    branches: list[Span] = []
    subtree_ends: list[np.ndarray] = []
    row = 0
    for part in parts:
        first_row: dict[int, int] = {}
        last_row: dict[int, int] = {}  # on the path up to and including a node, which may be empty
        for node in part:
            first_row[id(node)] = row
            above = -1 if node.parent is None else last_row[id(node.parent)]
            row += len(node.ids)
            last_row[id(node)] = row - 1 if len(node.ids) else above
            if id(node) not in already_owned:
                already_owned.add(id(node))
                for source in node.tree.source_nodes(node):
                    owned.append(source)
                    rows[id(source)] = _rows_of_last_tokens(node, len(source.ids), first_row, last_row)
        end = _subtree_ends(part, first_row)
        subtree_ends += [np.full(len(node.ids), end[id(node)], np.int64) for node in part]
        part_runs, part_branches = _spans(part, first_row, end)
        runs += part_runs
        branches += part_branches
    nodes = [node for part in parts for node in part]
    empty = [np.zeros(0, np.int64)]
    return PackedBatch(
        input_ids=np.concatenate(empty + [node.ids for node in nodes]),
        position_ids=np.concatenate(empty + [np.arange(node.start, node.end) for node in nodes]),
        subtree_end=np.concatenate(empty + subtree_ends),
        calls=[Call(runs, True), *_nesting_levels(branches)],
        owned=owned,
        _rows=rows,
    )


def _rows_of_last_tokens(
    node: Node | None, count: int, first_row: dict[int, int], last_row: dict[int, int]
) -> tuple[list[range], int]:
    """(rows, previous row) of the last `count` tokens on the path to a node; they must make up whole nodes."""
    ranges: list[range] = []
    while count:
        assert node is not None
        start, length = first_row[id(node)], len(node.ids)
        ranges.append(range(start, start + length))
        count -= length
        node = node.parent
    return ranges[::-1], -1 if node is None else last_row[id(node)]


def _concat_ranges(ranges: list[range]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(r.start, r.stop) for r in ranges)])


def _subtree_ends(part: TreePart, first_row: dict[int, int]) -> dict[int, int]:
    """id(node) → the row after the last token of its subtree."""
    end = {id(node): first_row[id(node)] + len(node.ids) for node in part}
    for node in reversed(part):
        if node.parent is not None:
            end[id(node.parent)] = max(end[id(node.parent)], end[id(node)])
    return end


def _spans(part: TreePart, first_row: dict[int, int], end: dict[int, int]) -> tuple[list[Span], list[Span]]:
    """(runs, branches) of one part of a tree.

    A run is a path of nodes whose rows are contiguous; it attends to itself causally, and every row is in one run. The
    further children of a node (all but the first) and their subtrees are contiguous, too, right after the first child's
    subtree, and all of them see the node's run up to the node's end: one span for each branching node, whatever the
    number of branches.
    """
    run_start: dict[int, int] = {}
    runs: list[tuple[int, int]] = []
    branches: list[Span] = []
    continues_parent: set[int] = set()
    children: dict[int, list[Node]] = {}
    for node in part:
        if node.parent is not None:
            children.setdefault(id(node.parent), []).append(node)
    for node in part:
        node_end = first_row[id(node)] + len(node.ids)
        if id(node) in continues_parent:
            start = run_start[id(node)] = run_start[id(node.parent)]
            runs[-1] = start, node_end
        else:
            start = run_start[id(node)] = first_row[id(node)]
            runs.append((start, node_end))
        followers = children.get(id(node), [])
        if not followers:
            continue
        first_child = followers[0]
        continues_parent.add(id(first_child))
        q0, q1 = end[id(first_child)], end[id(node)]
        if q1 > q0 and node_end > start:
            branches.append(Span(q0, q1, start, node_end))
    return [Span(a, b, a, b) for a, b in runs if b > a], branches


def _nesting_levels(branches: list[Span]) -> list[Call]:
    """One call for each level of nesting: two branches are nested or disjoint, and those of one level share no rows."""
    levels: list[list[Span]] = []
    enclosing_ends: list[int] = []  # q1 of the branches that contain the current row, outermost first
    for span in sorted(branches, key=lambda s: (s.q0, -s.q1)):
        while enclosing_ends and enclosing_ends[-1] <= span.q0:
            enclosing_ends.pop()
        if len(levels) == len(enclosing_ends):
            levels.append([])
        levels[len(enclosing_ends)].append(span)
        enclosing_ends.append(span.q1)
    return [Call(spans, False) for spans in levels]
