"""Parts of token trees as messages between ranks: from the owner rank of a prompt to those that train it.

Parts that stay on their rank are passed on as they are. What arrives elsewhere has nodes of its own, with the same tokens,
and the supervised tokens of the nodes that the parts own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.batch.parts import OwnedPart
from pact_fast.batch.tree import Node, TokenTree
from pact_fast.components import LossContext

NOT_COLUMNS = ("node", "context", "prompt", "rollout", "teacher", "pair_weight", "offset")
COLUMNS = [f.name for f in dataclasses.fields(ScoredTokens) if f.name not in NOT_COLUMNS]


@dataclass
class ScoredUnit:
    """Parts that go into the same pack, and their supervised tokens.

    parts   nodes, and which of them the pack owns
    scored  supervised tokens of the owned nodes; none is empty, and a teacher is among them
    """

    parts: list[OwnedPart]
    scored: list[ScoredTokens]

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return sum(len(s.index) for s in self.scored)


def to_message(unit: ScoredUnit) -> dict[str, Any]:
    """The unit as arrays, in the types that `World.all_to_all` sends."""
    number = {id(source): k for k, source in enumerate(_sources(unit.parts))}
    place = {id(s): k for k, s in enumerate(unit.scored)}
    heads = [
        (
            number[id(s.node)], s.context, s.prompt, -1 if s.rollout is None else s.rollout, len(s.index),
            -1 if s.teacher is None else place[id(s.teacher)], s.offset,
        )
        for s in unit.scored
    ]  # fmt: skip
    return {
        "parts": [_part_message(part) for part in unit.parts],
        "scored": np.array(heads, np.int64).reshape(-1, 7),
        "columns": {name: _concatenate([getattr(s, name) for s in unit.scored]) for name in COLUMNS},
        "pair_weight": _concatenate([s.pair_weight for s in unit.scored if s.teacher is not None]),
    }


def from_message(message: dict[str, Any]) -> ScoredUnit:
    """The inverse of `to_message`, with nodes of trees of its own."""
    parts = [_part_of(part) for part in message["parts"]]
    sources = list(_sources(parts))
    heads = message["scored"].tolist()
    counts = [head[4] for head in heads]
    columns: dict[str, list[Any]] = {name: split_tokens(column, counts) for name, column in message["columns"].items()}
    scored = [
        ScoredTokens(
            sources[source], LossContext(context), prompt, None if rollout < 0 else rollout, offset=offset,
            **{name: arrays[k] for name, arrays in columns.items()},
        )
        for k, (source, context, prompt, rollout, _, _, offset) in enumerate(heads)
    ]  # fmt: skip
    pairs = [(scored[k], scored[head[5]]) for k, head in enumerate(heads) if head[5] >= 0]
    weights = split_tokens(message["pair_weight"], [len(student.index) for student, _ in pairs])
    for (student, teacher), weight in zip(pairs, weights, strict=True):
        student.teacher, student.pair_weight = teacher, weight
    return ScoredUnit(parts, scored)


def _sources(parts: list[OwnedPart]) -> Iterator[Node]:
    """The caller's nodes of all parts, in the order of messages."""
    return (source for part in parts for sources in part.sources.values() for source in sources)


def _part_message(part: OwnedPart) -> dict[str, Any]:
    nodes, sources = part
    position = {id(node): index for index, node in enumerate(nodes)}
    ends = [(index, len(source.ids)) for index, found in sources.items() for source in found]
    return {
        "start": nodes[0].start,
        "parents": np.array([-1 if n.parent is None else position[id(n.parent)] for n in nodes], np.int64),
        "lengths": np.array([len(n.ids) for n in nodes], np.int64),
        "ids": _concatenate([n.ids for n in nodes]),
        "sources": np.array(ends, np.int64).reshape(-1, 2),
    }


def _part_of(message: dict[str, Any]) -> OwnedPart:
    tree = TokenTree(message["start"])
    nodes: list[Node] = []
    for parent, ids in zip(
        message["parents"].tolist(), split_tokens(message["ids"], message["lengths"].tolist()), strict=True
    ):
        nodes.append(tree.add(ids, None if parent < 0 else nodes[parent]))
    sources: dict[int, list[Node]] = {}
    for index, count in message["sources"].tolist():
        sources.setdefault(index, []).append(_source(nodes[index], count))
    return OwnedPart(nodes, sources)


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
