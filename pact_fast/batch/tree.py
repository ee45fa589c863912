"""Token trees: sequences with common prefixes, in which each common segment is stored, and later computed, once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False)
class Node:
    """A segment of tokens that continues its parent. Made by `TokenTree.add`.

    tree      the tree that the node belongs to
    ids       int64 [n] token ids; n may be 0
    parent    None for the root
    start     position of the first token in its sequence
    children  nodes that continue this one
    """

    tree: TokenTree
    ids: np.ndarray
    parent: Node | None
    start: int
    children: list[Node] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.ids)

    def path(self) -> list[Node]:
        """The nodes from the root to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class TokenTree:
    """A tree of token segments such as x → {τ…} or x → h* → x′ → {τ…}; every root-to-leaf path is one sequence.

    tree = TokenTree()
    x = tree.add(prompt_ids)
    y = tree.add(rollout_ids, parent=x)

    `start` is the position of the root's first token; not 0 for a tree that continues a cached path (PrefixCache). `pairs`
    are leaves that packs keep together.
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.nodes: list[Node] = []
        self.pairs: list[tuple[Node, Node]] = []

    def add(self, ids: np.ndarray, parent: Node | None = None) -> Node:
        """Add a segment after `parent`, or the root if `parent` is None, and return its node.

        Raises ValueError for a second root or a parent of another tree.
        """
        if parent is None and self.nodes:
            raise ValueError("a tree has one root; pass parent=")
        if parent is not None and parent.tree is not self:
            raise ValueError("the parent belongs to another tree")
        start = self.start if parent is None else parent.end
        node = Node(self, np.asarray(ids, dtype=np.int64), parent, start)
        if parent is not None:
            parent.children.append(node)
        self.nodes.append(node)
        return node

    def pair(self, a: Node, b: Node) -> None:
        """Keep two leaves together, because a loss compares their tokens: no pack has one without the other."""
        self.pairs.append((a, b))

    def leaves(self) -> Iterator[Node]:
        return (node for node in self.nodes if not node.children)

    def subtree_sizes(self) -> dict[int, int]:
        """id(node) → number of tokens of the node and of all nodes below it."""
        sizes = {id(node): len(node.ids) for node in self.nodes}
        for node in reversed(self.nodes):  # a node is added after its parent
            if node.parent is not None:
                sizes[id(node.parent)] += sizes[id(node)]
        return sizes

    def source_nodes(self, node: Node) -> list[Node]:
        """The caller's nodes whose last token is this node's last token.

        This is the node itself, except in a merged tree, whose nodes are not the caller's (`batch/merge.py`).
        """
        return [node]

    def __len__(self) -> int:
        """Number of tokens, shared ones counted once."""
        return sum(len(node.ids) for node in self.nodes)
