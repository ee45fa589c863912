"""Siblings that begin alike: what they have in common becomes a node of its own, which is computed once.

A merged tree is laid out in place of the caller's. It holds the same paths, so that positions and masks are right by
themselves, and it knows where each of the caller's nodes ends: the node's tokens are the last ones on the path to there.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from pact_fast.batch.tree import Node, TokenTree

# A branching inside its parent's largest child costs a span of attention; any other also one more partial result for every
# row that branches off. In tokens of the trunk, measured on a CPU, and for GPUs reckoned from their bandwidth:
SPAN = 16
ROWS = 32  # so many rows cost as much as one token


class Suffix:
    """Of one of the caller's nodes, the tokens from `start` on: those that have no place yet."""

    __slots__ = ("node", "start")

    def __init__(self, node: Node, start: int = 0):
        self.node, self.start = node, start

    def __len__(self) -> int:
        return len(self.node.ids) - self.start

    def ids(self, start: int, end: int) -> np.ndarray:
        """Counted from the rest's first token."""
        return self.node.ids[self.start + start : self.start + end]


class MergedTree(TokenTree):
    """Made by `merged`. A node of the caller's that is empty ends where its parent does."""

    def __init__(self, start: int) -> None:
        super().__init__(start)
        self._ending: dict[int, list[Node]] = {}

    def ending(self, node: Node) -> list[Node]:
        return self._ending.get(id(node), [])

    def place(self, group: list[Suffix], count: int, parent: Node | None) -> tuple[Node, list[Suffix]]:
        """A node of the first `count` tokens of a group, which are the same in all of it, and what follows that node."""
        here = self.add(group[0].ids(0, count), parent)
        ending = self._ending[id(here)] = []
        left: list[Suffix] = []
        todo = [Suffix(rest.node, rest.start + count) for rest in reversed(group)]
        while todo:
            rest = todo.pop()
            if len(rest):
                left.append(rest)
            else:
                ending.append(rest.node)
                todo += [Suffix(child) for child in reversed(rest.node.children)]
        return here, left


def merged(tree: TokenTree) -> TokenTree:
    """The same paths with fewer tokens: what begins alike is one node up to where it parts, if that saves enough."""
    if not tree.nodes:
        return tree
    sizes = tree.subtree_sizes()
    result = MergedTree(tree.start)
    todo = [(*result.place([Suffix(tree.nodes[0])], len(tree.nodes[0].ids), None), 0)]
    while todo:
        parent, rests, agree = todo.pop()  # what follows `parent`, and with how many tokens all of it begins
        groups = sorted(_by_token(rests, agree), key=lambda group: -sum(_sizes(group, sizes)))
        for index, group in enumerate(groups):
            common = _common(group, agree)
            behind = [size - common for size in _sizes(group, sizes)]
            branching = sum(behind) - max(behind) if index or agree else 0
            if len(group) == 1 or common * (len(group) - 1) >= SPAN + branching / ROWS:
                todo.append((*result.place(group, common, parent), 0))
            else:
                todo.append((parent, group, common))  # parts of the group may have more in common
    return result


def _by_token(rests: list[Suffix], at: int) -> list[list[Suffix]]:
    """Groups that have the same token there; a rest that ends before is a group by itself."""
    if len(rests) == 1:
        return [rests]
    groups: dict[Hashable, list[Suffix]] = {}
    for rest in rests:
        groups.setdefault(int(rest.node.ids[rest.start + at]) if len(rest) > at else rest, []).append(rest)
    return list(groups.values())


def _common(group: list[Suffix], agree: int) -> int:
    """With how many tokens all of the group begin, known to be at least `agree`."""
    common = min(len(rest) for rest in group)
    for rest in group[1:]:
        differs = rest.ids(agree, common) != group[0].ids(agree, common)
        if differs.any():
            common = agree + int(differs.argmax())
    return common


def _sizes(group: list[Suffix], sizes: dict[int, int]) -> list[int]:
    """Tokens of each rest and of all below it."""
    return [sizes[id(rest.node)] - rest.start for rest in group]
