"""Prefix merging: tokens that siblings have in common at their start become a node of their own, computed once.

The merged tree replaces the caller's tree when packs are built. It has the same root-to-leaf paths, so positions and
masks need no correction, and it records where each of the caller's nodes ends: the tokens of such a node are the last
ones on the path to that point.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from pact_fast.batch.tree import Node, TokenTree

# The cost of a branching, in decoder tokens. A branching inside its parent's largest child adds one attention span; any
# other also adds one partial attention result for every row that branches off. Measured on a CPU, derived from memory
# bandwidth for GPUs.
SPAN_COST = 16
ROWS_PER_TOKEN = 32  # partial results of this many rows cost as much as one token


class Suffix:
    """The tokens of one of the caller's nodes that are not placed in the merged tree yet.

    node   the caller's node
    start  index of the first remaining token in node.ids
    """

    __slots__ = ("node", "start")

    def __init__(self, node: Node, start: int = 0):
        self.node, self.start = node, start

    def __len__(self) -> int:
        return len(self.node.ids) - self.start

    def ids(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end), counted from the first remaining token."""
        return self.node.ids[self.start + start : self.start + end]


class MergedTree(TokenTree):
    """The result of `merge_prefixes`. An empty node of the caller's ends where its parent ends."""

    def __init__(self, start: int) -> None:
        super().__init__(start)
        self._sources: dict[int, list[Node]] = {}

    def source_nodes(self, node: Node) -> list[Node]:
        return self._sources.get(id(node), [])

    def add_prefix(self, group: list[Suffix], count: int, parent: Node | None) -> tuple[Node, list[Suffix]]:
        """Add a node of the first `count` tokens, which all suffixes of the group share.

        Returns (the node, the suffixes that continue it). Where a suffix is used up, its node's children continue
        instead.
        """
        added = self.add(group[0].ids(0, count), parent)
        sources = self._sources[id(added)] = []
        continuing: list[Suffix] = []
        pending = [Suffix(suffix.node, suffix.start + count) for suffix in reversed(group)]
        while pending:
            suffix = pending.pop()
            if len(suffix):
                continuing.append(suffix)
            else:
                sources.append(suffix.node)
                pending += [Suffix(child) for child in reversed(suffix.node.children)]
        return added, continuing


def merge_prefixes(tree: TokenTree) -> TokenTree:
    """A tree with the same paths, in which siblings share common first tokens where that saves more than it costs."""
    if not tree.nodes:
        return tree
    sizes = tree.subtree_sizes()
    result = MergedTree(tree.start)
    # (parent in the result, suffixes that continue it, number of first tokens that all of them are known to share)
    pending = [(*result.add_prefix([Suffix(tree.nodes[0])], len(tree.nodes[0].ids), None), 0)]
    while pending:
        parent, suffixes, shared = pending.pop()
        groups = sorted(_group_by_token(suffixes, shared), key=lambda group: -sum(_subtree_tokens(group, sizes)))
        for index, group in enumerate(groups):
            common = _common_prefix_length(group, shared)
            remaining = [size - common for size in _subtree_tokens(group, sizes)]
            branching_rows = sum(remaining) - max(remaining) if index or shared else 0
            if len(group) == 1 or common * (len(group) - 1) >= SPAN_COST + branching_rows / ROWS_PER_TOKEN:
                pending.append((*result.add_prefix(group, common, parent), 0))
            else:
                pending.append((parent, group, common))  # subsets of the group may share more
    return result


def _group_by_token(suffixes: list[Suffix], index: int) -> list[list[Suffix]]:
    """Groups with the same token at `index`; a suffix that ends before it is a group by itself."""
    if len(suffixes) == 1:
        return [suffixes]
    groups: dict[Hashable, list[Suffix]] = {}
    for suffix in suffixes:
        key = int(suffix.node.ids[suffix.start + index]) if len(suffix) > index else suffix
        groups.setdefault(key, []).append(suffix)
    return list(groups.values())


def _common_prefix_length(group: list[Suffix], at_least: int) -> int:
    """Number of first tokens that all suffixes share; `at_least` of them are known to be equal."""
    common = min(len(suffix) for suffix in group)
    for suffix in group[1:]:
        differs = suffix.ids(at_least, common) != group[0].ids(at_least, common)
        if differs.any():
            common = at_least + int(differs.argmax())
    return common


def _subtree_tokens(group: list[Suffix], sizes: dict[int, int]) -> list[int]:
    """Tokens of each suffix and of all nodes below it."""
    return [sizes[id(suffix.node)] - suffix.start for suffix in group]
