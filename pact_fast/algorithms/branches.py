"""Rollouts whose history was rewritten, as nodes of a token tree: branches share what they have in common.

A template may drop what it has written, for instance the reasoning of earlier turns once the user speaks again. The
rollout then goes on in another context: it branches (`Trajectory.branches`). Every sampled token is scored once, in the
branch in which it was sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pact_fast.batch.tree import Node, TokenTree
from pact_fast.data.types import Trajectory


class Piece(NamedTuple):
    """Tokens [start, end) of a rollout, which are the last ones of a node."""

    node: Node
    start: int
    end: int

    @property
    def offset(self) -> int:
        """Index in the rollout of the node's first token; negative if the node begins with tokens of the prompt."""
        return self.end - len(self.node.ids)


def rewound(trajectories: Sequence[Trajectory]) -> int:
    """Tokens at the end of the prompt that some branch of these rollouts does not share: of its generation prompt."""
    return max((t.rewound for t in trajectories), default=0)


def add_context(tree: TokenTree, ids: np.ndarray, parent: Node | None, tail: int) -> tuple[Node, Node]:
    """Add a context that rollouts follow. Returns (the node of all but its last `tail` tokens, the node it ends in)."""
    if not tail:
        node = tree.add(ids, parent)
        return node, node
    if len(ids) <= tail:
        raise ValueError(f"a context of {len(ids)} tokens does not end with a generation prompt of {tail}")
    head = tree.add(ids[:-tail], parent)
    return head, tree.add(ids[-tail:], head)


def add_branches(tree: TokenTree, parent: Node, trajectory: Trajectory, tail: int) -> list[Piece]:
    """Add a rollout after `parent`, and return its pieces, which tile its tokens in order.

    Args:
        tree: The tree of `parent`.
        parent: The end of a context made by `add_context` with the same `tail`.
        trajectory: The rollout.
        tail: `rewound` of the rollouts of the prompt.

    Raises:
        ValueError: The context does not end with the prompt's last `tail` tokens in a node of their own.
    """
    n = len(trajectory.ids)
    if not len(trajectory.branches):
        return [Piece(tree.add(trajectory.ids, parent), 0, n)]
    ends = trajectory.prompt_ids[len(trajectory.prompt_ids) - tail :]
    if tail and (parent.parent is None or not np.array_equal(parent.ids, ends)):
        raise ValueError("rollouts with branches must follow a context that was made by add_context")
    departures = trajectory.departures
    starts = [0, *trajectory.branches[:, 0].tolist()]
    borders = sorted({*starts, *(at for at in departures if at > 0), n})
    before = dict(zip(starts[1:], departures, strict=True))  # start of a branch → where it departs
    nodes: dict[int, Node] = {0: parent}  # by the token behind the last one
    pieces: list[Piece] = []
    for start, end in itertools.pairwise(borders):
        at = before.get(start, start)
        ids = trajectory.ids[start:end]
        if at < 0:
            assert parent.parent is not None
            node = tree.add(np.concatenate([ends[: tail + at], ids]), parent.parent)
        else:
            node = tree.add(ids, nodes[at])
        nodes[end] = node
        pieces.append(Piece(node, start, end))
    return pieces
