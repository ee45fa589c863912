"""Tokens and attention pairs of an update, with and without prefix sharing; `model/flops.py` makes FLOPs of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pact_fast.batch.packing import PackedBatch
from pact_fast.batch.tree import TokenTree


class Work(NamedTuple):
    """Amount of computation in the decoder.

    tokens  tokens that pass through the linear layers
    pairs   query-key pairs of attention, for each layer and head
    """

    tokens: int
    pairs: int


def work_of_packs(batches: Sequence[PackedBatch]) -> Work:
    """The work of packs as they are, shared prefixes counted once.

    The pairs follow from the mask: row k is seen by rows k to subtree_end[k] − 1.
    """
    pairs = sum(int((batch.subtree_end - np.arange(len(batch))).sum()) for batch in batches)
    return Work(sum(len(batch) for batch in batches), pairs)


def work_of_paths(trees: Sequence[TokenTree]) -> Work:
    """The work without sharing: every root-to-leaf path as a sequence of its own, with causal attention."""
    lengths = [leaf.end for tree in trees for leaf in tree.leaves()]
    return Work(sum(lengths), sum(n * (n + 1) // 2 for n in lengths))
