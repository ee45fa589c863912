"""Parts of token trees as messages between ranks: from the rank that plans a prompt to those that train it.

A part that stays on its rank is passed on as it is. What arrives elsewhere has nodes of its own, with the same tokens,
and the supervised tokens of the nodes that the part owns.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.batch.parts import OwnedPart
from pact_fast.batch.tree import Node, TokenTree
from pact_fast.components import LossContext

COLUMNS = [f.name for f in dataclasses.fields(ScoredTokens) if f.name not in ("node", "context", "prompt", "rollout")]


@dataclass
class ScoredPart:
    """A part and its supervised tokens.

    part    nodes, and which of them its pack owns
    scored  supervised tokens of the owned nodes; none is empty
    """

    part: OwnedPart
    scored: list[ScoredTokens]

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(len(s.index) for s in self.scored)


def to_message(scored_part: ScoredPart) -> dict[str, Any]:
    """The part as arrays, in the types that `World.all_to_all` sends."""
    (nodes, sources), scored = scored_part.part, scored_part.scored
    position = {id(node): index for index, node in enumerate(nodes)}
    ends = [(index, source) for index, found in sources.items() for source in found]
    number = {id(source): k for k, (_, source) in enumerate(ends)}
    return {
        "start": nodes[0].start,
        "parents": np.array([-1 if n.parent is None else position[id(n.parent)] for n in nodes], np.int64),
        "lengths": np.array([len(n.ids) for n in nodes], np.int64),
        "ids": _concatenate([n.ids for n in nodes]),
        "sources": np.array([(index, len(source.ids)) for index, source in ends], np.int64).reshape(-1, 2),
        "scored": np.array(
            [
                (number[id(s.node)], s.context, s.prompt, -1 if s.rollout is None else s.rollout, len(s.index))
                for s in scored
            ],
            np.int64,
        ).reshape(-1, 5),
        "columns": {name: _concatenate([getattr(s, name) for s in scored]) for name in COLUMNS},
    }


def from_message(message: dict[str, Any]) -> ScoredPart:
    """The inverse of `to_message`, with nodes of a tree of its own."""
    tree = TokenTree(message["start"])
    nodes: list[Node] = []
    for parent, ids in zip(
        message["parents"].tolist(), split_tokens(message["ids"], message["lengths"].tolist()), strict=True
    ):
        nodes.append(tree.add(ids, None if parent < 0 else nodes[parent]))
    sources: dict[int, list[Node]] = {}
    ends: list[Node] = []
    for index, count in message["sources"].tolist():
        ends.append(_source(nodes[index], count))
        sources.setdefault(index, []).append(ends[-1])
    heads = message["scored"].tolist()
    counts = [count for *_, count in heads]
    columns = {name: split_tokens(column, counts) for name, column in message["columns"].items()}
    scored = [
        ScoredTokens(
            ends[end], LossContext(context), prompt, None if rollout < 0 else rollout,
            **{name: parts[k] for name, parts in columns.items()},
        )
        for k, (end, context, prompt, rollout, _) in enumerate(heads)
    ]  # fmt: skip
    return ScoredPart(OwnedPart(nodes, sources), scored)


def split_tokens(array: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """Pieces [..., n] of an array [..., N], one for each length n; none for no lengths."""
    return [array[..., begin:end] for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0))]


def _source(node: Node, count: int) -> Node:
    """A caller's node of `count` tokens that ends where `node` ends; in a merged tree it may begin above it."""
    if count == len(node.ids):
        return Node(node.tree, node.ids, None, node.start)
    path = itertools.takewhile(lambda n: n.end > node.end - count, reversed(node.path()))
    ids = _concatenate([n.ids for n in path][::-1])[-count:] if count else node.ids[:0]
    return Node(node.tree, ids, None, node.end - count)


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
