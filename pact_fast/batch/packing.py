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

from pact_fast.batch.bins import first_fit
from pact_fast.batch.parts import (
    OwnedPart,
    TreePart,
    Unit,
    assign,
    claim_nodes,
    cost_table,
    merge_trees,
    split_trees,
    unit_size,
)
from pact_fast.batch.tree import Node, TokenTree


class AttentionSpan(NamedTuple):
    """Query rows [q0, q1) that see key rows [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int


class AttentionCall(NamedTuple):
    """One dense (variable-length) attention call.

    spans   in order of their query rows; no query row is in two spans of a call
    causal  True: each span's queries are its own keys, seen causally. False: queries see the whole key range
    """

    spans: list[AttentionSpan]
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
    calls: list[AttentionCall]
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
    units = split_trees(merge_trees(trees, share and merge), max_tokens, share)
    bins = [sorted(members) for members in first_fit([unit_size(unit) for unit in units], max_tokens)]
    return _build_packs(units, bins)


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
    trees = merge_trees(trees, share and merge)
    units = split_trees(trees, max_tokens, share)
    budget = max_tokens
    while share and len(units) < ranks and budget > 1:
        budget //= 2
        units = split_trees(trees, budget, share)
    bins, table = assign(cost_table(units), max_tokens, ranks, cost)
    batches = _build_packs(units, bins)
    return [[batches[index] for index in row] for row in table]


def _build_packs(units: list[Unit], bins: list[list[int]]) -> list[PackedBatch]:
    owned = iter(claim_nodes([units[i] for members in bins for i in members]))
    return [lay_out([part for _ in members for part in next(owned)]) for members in bins]


def lay_out(parts: Sequence[OwnedPart]) -> PackedBatch:
    """A pack of parts of trees, one after the other. Two parts may repeat a node, so row numbers are kept per part."""
    rows: dict[int, tuple[list[range], int]] = {}
    owned: list[Node] = []
    runs: list[AttentionSpan] = []
    branches: list[AttentionSpan] = []
    subtree_ends: list[np.ndarray] = []
    row = 0
    for part, sources in parts:
        first_row: dict[int, int] = {}
        last_row: dict[int, int] = {}  # on the path up to and including a node, which may be empty
        for index, node in enumerate(part):
            first_row[id(node)] = row
            above = -1 if node.parent is None else last_row[id(node.parent)]
            row += len(node.ids)
            last_row[id(node)] = row - 1 if len(node.ids) else above
            for source in sources.get(index, ()):
                owned.append(source)
                rows[id(source)] = _rows_of_last_tokens(node, len(source.ids), first_row, last_row)
        end = _subtree_ends(part, first_row)
        subtree_ends += [np.full(len(node.ids), end[id(node)], np.int64) for node in part]
        part_runs, part_branches = _spans(part, first_row, end)
        runs += part_runs
        branches += part_branches
    nodes = [node for part, _ in parts for node in part]
    empty = [np.zeros(0, np.int64)]
    return PackedBatch(
        input_ids=np.concatenate(empty + [node.ids for node in nodes]),
        position_ids=np.concatenate(empty + [np.arange(node.start, node.end) for node in nodes]),
        subtree_end=np.concatenate(empty + subtree_ends),
        calls=[AttentionCall(runs, True), *_nesting_levels(branches)],
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


def _spans(
    part: TreePart, first_row: dict[int, int], end: dict[int, int]
) -> tuple[list[AttentionSpan], list[AttentionSpan]]:
    """(runs, branches) of one part of a tree.

    A run is a path of nodes whose rows are contiguous; it attends to itself causally, and every row is in one run. The
    further children of a node (all but the first) and their subtrees are contiguous, too, right after the first child's
    subtree, and all of them see the node's run up to the node's end: one span for each branching node, whatever the
    number of branches.
    """
    run_start: dict[int, int] = {}
    runs: list[tuple[int, int]] = []
    branches: list[AttentionSpan] = []
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
            branches.append(AttentionSpan(q0, q1, start, node_end))
    return [AttentionSpan(a, b, a, b) for a, b in runs if b > a], branches


def _nesting_levels(branches: list[AttentionSpan]) -> list[AttentionCall]:
    """One call for each level of nesting: two branches are nested or disjoint, and those of one level share no rows."""
    levels: list[list[AttentionSpan]] = []
    enclosing_ends: list[int] = []  # q1 of the branches that contain the current row, outermost first
    for span in sorted(branches, key=lambda s: (s.q0, -s.q1)):
        while enclosing_ends and enclosing_ends[-1] <= span.q0:
            enclosing_ends.pop()
        if len(levels) == len(enclosing_ends):
            levels.append([])
        levels[len(enclosing_ends)].append(span)
        enclosing_ends.append(span.q1)
    return [AttentionCall(spans, False) for spans in levels]
