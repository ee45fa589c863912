"""Packs of an optimizer step: token trees → packs by micro-step and replica, and their cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from pact_fast.batch.flops import work_of_packs, work_of_paths
from pact_fast.batch.packing import PackedBatch, distribute_packs
from pact_fast.batch.tree import TokenTree
from pact_fast.model.flops import flops_per_token_and_pair

PackTable = list[list[PackedBatch]]  # [micro-step][replica]


@dataclass
class PackCost:
    """Cost of an optimizer step, over all ranks. FLOPs are the decoder's, forward and backward.

    tokens           computed by the decoder
    tokens_unshared  if every sequence ran alone
    flops            of `tokens`
    flops_unshared   of `tokens_unshared`
    flops_waited     if every replica had the load of the busiest one in each micro-step (waiting included)
    capacity         tokens that the packs had room for
    packs            non-empty packs
    """

    tokens: int = 0
    tokens_unshared: int = 0
    flops: float = 0.0
    flops_unshared: float = 0.0
    flops_waited: float = 0.0
    capacity: int = 0
    packs: int = 0


def make_packs(
    trees: Sequence[TokenTree],
    model: PreTrainedModel,
    *,
    max_tokens: int,
    replicas: int,
    share: bool,
    merge: bool,
) -> tuple[PackTable, PackCost]:
    """Pack the trees of an optimizer step and distribute the packs by FLOPs. The same on every rank.

    Args:
        trees: Token trees of all prompts.
        model: Its shape gives the FLOPs.
        max_tokens: Token budget of a pack.
        replicas: Groups of ranks that work on packs of their own.
        share: Compute shared prefixes once.
        merge: Also compute equal beginnings of a prompt's rollouts once.
    """
    per_token, per_pair = flops_per_token_and_pair(model)

    def flops(tokens: int, pairs: int) -> float:
        return per_token * tokens + per_pair * pairs

    table = distribute_packs(trees, max_tokens=max_tokens, ranks=replicas, cost=flops, share=share, merge=merge)
    packs = [pack for row in table for pack in row]
    work, unshared = work_of_packs(packs), work_of_paths(trees)
    busiest = [max(flops(*work_of_packs([pack])) for pack in row) for row in table]
    return table, PackCost(
        tokens=work.tokens,
        tokens_unshared=unshared.tokens,
        flops=flops(*work),
        flops_unshared=flops(*unshared),
        flops_waited=replicas * sum(busiest),
        capacity=sum(max(len(pack), max_tokens) for pack in packs),
        packs=sum(len(pack) > 0 for pack in packs),
    )
