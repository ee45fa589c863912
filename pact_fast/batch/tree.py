"""A tree of token segments: what several sequences share is held, and later computed, once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False)
class Node:
    """A segment of tokens that continues its parent. `ids` is int64 [n]; n may be 0. `start`: position of the first token."""

    tree: TokenTree
    ids: np.ndarray
    parent: Node | None
    start: int
    children: list[Node] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    def path(self) -> list[Node]:
        """From the root to this node."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class TokenTree:
    """x → {τ…}, x → h* → x′ → {τ…}, or any other tree.

    tree = TokenTree()
    x = tree.add(prompt_ids)
    y = tree.add(rollout_ids, parent=x)

    `start`: the position of the root's first token; not 0 for a tree that goes on after a kept path (PathCache).
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.nodes: list[Node] = []

    def add(self, ids: np.ndarray, parent: Node | None = None) -> Node:
        """Add a segment after `parent` (None: the root, once). Returns its handle."""
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

    def leaves(self) -> Iterator[Node]:
        return (node for node in self.nodes if not node.children)

    def subtree_sizes(self) -> dict[int, int]:
        """id(node) → tokens of the node and of all below it."""
        sizes = {id(node): len(node.ids) for node in self.nodes}
        for node in reversed(self.nodes):  # a node is added after its parent
            if node.parent is not None:
                sizes[id(node.parent)] += sizes[id(node)]
        return sizes

    def ending(self, node: Node) -> list[Node]:
        """The caller's nodes whose last token is this node's; a merged tree's nodes are not the caller's (trie.py)."""
        return [node]

    def __len__(self) -> int:
        """Tokens, shared ones counted once."""
        return sum(len(node.ids) for node in self.nodes)
