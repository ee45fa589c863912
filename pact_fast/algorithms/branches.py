"""Rollouts and expert traces whose history was rewritten, as nodes of a token tree: branches share common beginnings.

A template may drop what it has written, for instance the reasoning of earlier turns once the user speaks again. The
sequence then goes on in another context: it branches (`Branching`). Every token that is trained is scored once, in the
branch in which it was generated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pact_fast.batch.tree import Node, TokenTree
from pact_fast.chat.trace_context import TraceContext
from pact_fast.data.branching import Branching


class Piece(NamedTuple):
    """Tokens [start, end) of a rollout or an expert trace, which are the last ones of a node."""

    node: Node
    start: int
    end: int

    @property
    def offset(self) -> int:
        """Index, among these tokens, of the node's first one; negative if the node begins with tokens of the prompt."""
        return self.end - len(self.node.ids)

    def own(self, index: np.ndarray) -> np.ndarray:
        """The token indices that lie in the piece. `index` is ascending."""
        return index[(index >= self.start) & (index < self.end)]


@dataclass(frozen=True)
class ExpertNodes:
    """The expert trace in a tree.

    pieces  its nodes, which tile its tokens in order
    trace   its tokens
    """

    pieces: list[Piece]
    trace: TraceContext


def rewound(sequences: Iterable[Branching]) -> int:
    """Tokens at the end of the prompt that some branch of these rollouts or traces does not share: of its generation prompt."""
    return max((s.rewound for s in sequences), default=0)


def add_context(tree: TokenTree, ids: np.ndarray, parent: Node | None, tail: int) -> Node:
    """Add a context that rollouts follow. Returns the node in which it ends: of its last `tail` tokens, or of all (tail 0)."""
    if not tail:
        return tree.add(ids, parent)
    if len(ids) < tail:
        raise ValueError(f"a context of {len(ids)} tokens does not end with a generation prompt of {tail}")
    return tree.add(ids[-tail:], tree.add(ids[:-tail], parent))


def add_branches(tree: TokenTree, parent: Node, sequence: Branching, tail: int = 0) -> list[Piece]:
    """Add a rollout or an expert trace after `parent`, and return its pieces, which tile its tokens in order.

    Args:
        tree: The tree of `parent`.
        parent: The end of a context made by `add_context` with at least `sequence.rewound` tokens as `tail`.
        sequence: The rollout or trace.
        tail: Its last tokens that get a node of their own, because rollouts with branches follow it.

    Raises:
        ValueError: The context does not end with the prompt's last tokens in a node of their own, or the last branch has no
            more than `tail` tokens.
    """
    n = len(sequence.ids)
    if not len(sequence.branches) and not tail:
        return [Piece(tree.add(sequence.ids, parent), 0, n)]
    if sequence.rewound:
        _check_end(parent, sequence)
    departures = sequence.departures
    starts = [0, *sequence.branches[:, 0].tolist()]
    if tail and n - tail <= starts[-1]:
        raise ValueError(f"a trace whose last branch has {n - starts[-1]} tokens does not end with a prompt of {tail}")
    borders = sorted({*starts, *(at for at in departures if at > 0), n - tail, n})
    before = dict(zip(starts[1:], departures, strict=True))  # start of a branch → where it departs
    nodes: dict[int, Node] = {0: parent}  # by the token behind the last one
    pieces: list[Piece] = []
    for start, end in itertools.pairwise(borders):
        at = before.get(start, start)
        ids = sequence.ids[start:end]
        if at < 0:
            assert parent.parent is not None
            node = tree.add(np.concatenate([parent.ids[:at], ids]), parent.parent)
        else:
            node = tree.add(ids, nodes[at])
        nodes[end] = node
        pieces.append(Piece(node, start, end))
    return pieces


def _check_end(parent: Node, sequence: Branching) -> None:
    """ValueError unless `parent` holds the last tokens of the prompt, and no others."""
    n = len(parent.ids)
    ends = sequence.prompt_ids[len(sequence.prompt_ids) - n :]
    if parent.parent is None or n < sequence.rewound or not np.array_equal(parent.ids, ends):
        raise ValueError("rollouts with branches must follow a context that was made by add_context")
