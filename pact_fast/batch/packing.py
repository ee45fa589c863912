"""Lay trees out in packs under a token budget.

A pack is one row of tokens in depth-first order. That order makes attention simple: the tokens that may see token k are
exactly those between k and the end of k's subtree, so `subtree_end` [T] is the whole mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pact_fast.batch.merge import merged
from pact_fast.batch.tree import Node, TokenTree


class Span(NamedTuple):
    """Query rows [q0, q1) see key rows [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int


class Call(NamedTuple):
    """One dense attention call: spans in order of their rows, which they share with no other span of the call.

    causal: every span is its own key range, seen causally; otherwise key ranges are seen whole.
    """

    spans: list[Span]
    causal: bool

    def contiguous_rows(self) -> slice | None:
        """The query rows of the spans if these follow each other without a gap, else None."""
        gaps = any(a.q1 != b.q0 for a, b in itertools.pairwise(self.spans))
        return None if gaps else slice(self.spans[0].q0, self.spans[-1].q1)


@dataclass
class PackedBatch:
    """Trees in one row.

    input_ids, position_ids  int64 [T]
    subtree_end              int64 [T]: row k is seen by rows k ≤ q < subtree_end[k]
    calls                    the same, as dense attention calls: the first is causal and covers every row, each of the others
                             adds what rows see of one more level of ancestors
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_end: np.ndarray
    calls: list[Call]
    owned: list[Node]  # nodes whose tokens this pack accounts for; a node repeated by splitting is owned once
    _rows: dict[int, tuple[list[range], int]] = field(repr=False)  # id(owned node) -> (rows of its tokens, row before)

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, node: Node) -> np.ndarray:
        """[n] hidden row that predicts each token of an owned node: the row before it on its path.

        The first token of a path has no predecessor: row −1.
        """
        own, before = self._rows[id(node)]
        return _concatenated([range(before, before + 1), *own])[:-1]

    def path_rows(self, node: Node) -> np.ndarray:
        """[n] the row of every token on the path to a node; all of its nodes must be owned by this pack."""
        return _concatenated([part for n in node.path() for part in self._rows[id(n)][0]])


def pack(trees: Sequence[TokenTree], *, max_tokens: int, share: bool = True, merge: bool = False) -> list[PackedBatch]:
    """Pack trees, largest first, each into the first pack with room.

    A tree over the budget is split by leaves into sub-trees that repeat the shared path; a single path over the budget gets a
    pack of its own (nothing is ever cut). `share=False` gives every root-to-leaf path a copy of its own: the same numbers
    without sharing. `merge`: siblings that begin with the same tokens share these, too; nothing else changes for the caller.
    """
    forest = _merged(trees, share and merge)
    return _lay_out_all(_first_fit(_pieces(forest, max_tokens, share), max_tokens))


def distribute_packs(
    trees: Sequence[TokenTree],
    *,
    max_tokens: int,
    ranks: int,
    cost: Callable[[int, int], float],
    share: bool = True,
    merge: bool = False,
) -> list[list[PackedBatch]]:
    """Packs for `ranks` processes that work in step: packs[step][rank], the same on every process.

    `cost(tokens, pairs)` of a piece, see `tree.cost.Work`. Every process gets one pack a step; those of a step cost about the
    same. Where there is too little to share out, trees are split further than the budget asks (they repeat their shared path),
    and what still lacks is an empty pack.
    """
    if ranks == 1:
        return [[batch] for batch in pack(trees, max_tokens=max_tokens, share=share, merge=merge)]
    forest = _merged(trees, share and merge)
    pieces = _pieces(forest, max_tokens, share)
    budget = max_tokens
    while share and len(pieces) < ranks and budget > 1:
        budget //= 2
        pieces = _pieces(forest, budget, share)
    costs = [cost(*_work(piece)) for piece in pieces]
    steps = -(-len(_first_fit(pieces, max_tokens)) // ranks)
    while (bins := _balanced(pieces, costs, steps * ranks, max_tokens)) is None:
        steps += 1
    bins.sort(key=lambda members: -sum(costs[i] for i in members))  # a step waits for its slowest process
    batches = _lay_out_all([[pieces[i] for i in sorted(members)] for members in bins])
    load = [0.0] * ranks
    table = []
    for step in range(steps):
        row: list[PackedBatch] = [batches[0]] * ranks
        lightest = sorted(range(ranks), key=load.__getitem__)
        for place, rank in zip(range(step * ranks, (step + 1) * ranks), lightest, strict=True):
            row[rank] = batches[place]
            load[rank] += sum(costs[i] for i in bins[place])
        table.append(row)
    return table


Piece = list[Node]  # nodes of one tree in depth-first order, closed under parents


def _merged(trees: Sequence[TokenTree], merge: bool) -> Sequence[TokenTree]:
    return [merged(tree) for tree in trees] if merge else trees


def _pieces(trees: Sequence[TokenTree], max_tokens: int, share: bool) -> list[Piece]:
    return [piece for tree in trees for piece in _split(tree, max_tokens if share else 0)]


def _balanced(pieces: list[Piece], costs: list[float], count: int, max_tokens: int) -> list[list[int]] | None:
    """The dearest piece first, each into the cheapest of `count` bins with room for it; None if one finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    load, size = [0.0] * count, [0] * count
    for index in sorted(range(len(pieces)), key=lambda i: -costs[i]):
        tokens = _size(pieces[index])
        free = [b for b in range(count) if not bins[b] or size[b] + tokens <= max_tokens]
        if not free:
            return None
        target = min(free, key=load.__getitem__)
        bins[target].append(index)
        load[target] += costs[index]
        size[target] += tokens
    return bins


def _work(piece: Piece) -> tuple[int, int]:
    """(tokens, query-key pairs): a token sees all of its path up to itself."""
    pairs = sum(len(node.ids) * node.start + len(node.ids) * (len(node.ids) + 1) // 2 for node in piece)
    return _size(piece), pairs


def _first_fit(pieces: list[Piece], max_tokens: int) -> list[list[Piece]]:
    """The largest first, each into the first pack with room."""
    order = sorted(range(len(pieces)), key=lambda i: -_size(pieces[i]))
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        size = _size(pieces[index])
        target = next((b for b, free in enumerate(room) if size <= free), None)
        if target is None:
            bins.append([])
            room.append(max(max_tokens, size))
            target = len(bins) - 1
        bins[target].append(index)
        room[target] -= size
    return [[pieces[i] for i in sorted(members)] for members in bins]


def _lay_out_all(packs: list[list[Piece]]) -> list[PackedBatch]:
    owner: set[int] = set()
    return [_lay_out(pieces, owner) for pieces in packs]


def _size(piece: Piece) -> int:
    return sum(len(node.ids) for node in piece)


def _split(tree: TokenTree, budget: int) -> list[Piece]:
    """Depth-first pieces of at most `budget` tokens; one leaf is the smallest piece."""
    if not tree.nodes:
        return []
    if len(tree) <= budget:
        return [_depth_first(tree.nodes[0], None)]
    pieces: list[Piece] = []
    chosen: set[int] = set()
    size = 0
    for leaf in (node for node in _depth_first(tree.nodes[0], None) if not node.children):
        new = [node for node in leaf.path() if id(node) not in chosen]
        extra = sum(len(node.ids) for node in new)
        if chosen and size + extra > budget:
            pieces.append(_depth_first(tree.nodes[0], chosen))
            chosen, size, new = set(), 0, leaf.path()
            extra = sum(len(node.ids) for node in new)
        chosen |= {id(node) for node in new}
        size += extra
    return [*pieces, _depth_first(tree.nodes[0], chosen)]


def _depth_first(root: Node, chosen: set[int] | None) -> Piece:
    """Nodes of the (sub)tree, the child with the largest subtree first: it continues its parent's causal run."""
    order: Piece = []
    stack = [root]
    weight = root.tree.subtree_sizes()
    while stack:
        node = stack.pop()
        order.append(node)
        children = [c for c in node.children if chosen is None or id(c) in chosen]
        stack.extend(sorted(children, key=lambda c: weight[id(c)]))
    return order


def _lay_out(pieces: list[Piece], owner: set[int]) -> PackedBatch:
    """Concatenate pieces. Two of them may repeat a node, so everything about rows is worked out piece by piece."""
    rows: dict[int, tuple[list[range], int]] = {}
    owned: list[Node] = []
    runs: list[Span] = []
    branches: list[Span] = []
    subtree_ends: list[np.ndarray] = []
    row = 0
    for piece in pieces:
        first: dict[int, int] = {}
        before: dict[int, int] = {}  # the last row on the path up to and including a node
        for node in piece:
            first[id(node)] = row
            above = -1 if node.parent is None else before[id(node.parent)]
            row += len(node.ids)
            before[id(node)] = row - 1 if len(node.ids) else above
            if id(node) not in owner:
                owner.add(id(node))
                for own in node.tree.ending(node):
                    owned.append(own)
                    rows[id(own)] = _rows_up(node, len(own.ids), first, before)
        end = _subtree_ends(piece, first)
        subtree_ends += [np.full(len(node.ids), end[id(node)], np.int64) for node in piece]
        own_runs, own_branches = _spans(piece, first, end)
        runs += own_runs
        branches += own_branches
    nodes = [node for piece in pieces for node in piece]
    empty = [np.zeros(0, np.int64)]
    return PackedBatch(
        input_ids=np.concatenate(empty + [node.ids for node in nodes]),
        position_ids=np.concatenate(empty + [np.arange(node.start, node.end) for node in nodes]),
        subtree_end=np.concatenate(empty + subtree_ends),
        calls=[Call(runs, True), *_levels(branches)],
        owned=owned,
        _rows=rows,
    )


def _rows_up(node: Node | None, count: int, first: dict[int, int], before: dict[int, int]) -> tuple[list[range], int]:
    """Rows of the last `count` tokens on the path to a node, which are whole nodes, and the row before them."""
    parts: list[range] = []
    while count:
        assert node is not None
        start, length = first[id(node)], len(node.ids)
        parts.append(range(start, start + length))
        count -= length
        node = node.parent
    return parts[::-1], -1 if node is None else before[id(node)]


def _concatenated(parts: list[range]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(p.start, p.stop) for p in parts)])


def _subtree_ends(piece: Piece, first: dict[int, int]) -> dict[int, int]:
    """Row after the last token of each node's subtree."""
    end = {id(node): first[id(node)] + len(node.ids) for node in piece}
    for node in reversed(piece):
        if node.parent is not None:
            end[id(node.parent)] = max(end[id(node.parent)], end[id(node)])
    return end


def _spans(piece: Piece, first: dict[int, int], end: dict[int, int]) -> tuple[list[Span], list[Span]]:
    """(runs, branches) of one piece.

    A *run* is a path of nodes that lie directly behind each other; it attends to itself causally, and every row is in
    one. What branches off a node lies contiguously behind the node's first child, and all of it sees the node's run up to
    that node: one span per branching, whatever the number of branches.
    """
    run_start: dict[int, int] = {}
    runs: list[tuple[int, int]] = []
    branches: list[Span] = []
    follower: set[int] = set()
    children: dict[int, list[Node]] = {}
    for node in piece:
        if node.parent is not None:
            children.setdefault(id(node.parent), []).append(node)
    for node in piece:
        here = first[id(node)] + len(node.ids)
        if id(node) in follower:
            start = run_start[id(node)] = run_start[id(node.parent)]
            runs[-1] = start, here
        else:
            start = run_start[id(node)] = first[id(node)]
            runs.append((start, here))
        kids = children.get(id(node), [])
        if not kids:
            continue
        follower.add(id(kids[0]))
        branch = end[id(kids[0])], end[id(node)]
        if branch[1] > branch[0] and here > start:
            branches.append(Span(*branch, start, here))
    return [Span(a, b, a, b) for a, b in runs if b > a], branches


def _levels(branches: list[Span]) -> list[Call]:
    """Branches lie in each other or apart. Those of one level of nesting share no rows: one call each level."""
    levels: list[list[Span]] = []
    open_until: list[int] = []  # where the branches end that hold the current row
    for span in sorted(branches, key=lambda s: (s.q0, -s.q1)):
        while open_until and open_until[-1] <= span.q0:
            open_until.pop()
        if len(levels) == len(open_until):
            levels.append([])
        levels[len(open_until)].append(span)
        open_until.append(span.q1)
    return [Call(spans, False) for spans in levels]
