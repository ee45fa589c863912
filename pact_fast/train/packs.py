"""Packs of an optimizer step: every rank cuts the trees of its own prompts, all share a table of what the parts cost,
and each part goes to the rank that trains it. Parts that must share a pack are one unit: a row of the table.

Nobody but the owner rank of a prompt and those that train its parts ever holds its tokens, and a rank lays out its own
packs only. Which part goes where follows from the table, which is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pact_fast.algorithms.base import PromptBatch
from pact_fast.batch.flops import work_of_paths
from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.batch.packing import PackedBatch, lay_out
from pact_fast.batch.parts import Assignment, Unit, assign, claim_nodes, cost_table, merge_trees, split_trees
from pact_fast.batch.tree import TokenTree
from pact_fast.distributed.world import World
from pact_fast.train.part_messages import ScoredUnit, from_message, split_tokens, to_message

Flops = Callable[[int, int], float]  # (tokens, query-key pairs) → FLOPs


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


@dataclass
class Pack:
    """A pack of this replica, and the supervised tokens of what it owns.

    numbers  numbers of its units in the table of all units
    units    its units
    batch    their tokens in one row
    """

    numbers: list[int]
    units: list[ScoredUnit]
    batch: PackedBatch

    @property
    def scored(self) -> list[ScoredTokens]:
        """Supervised tokens in the order of the pack's loss table."""
        return [s for unit in self.units for s in unit.scored]


@dataclass
class StepPacks:
    """The packs of an optimizer step as one rank sees them.

    packs        those of this replica, one per micro-step
    cost         of all ranks
    longest      tokens of the longest sequence of all ranks
    local_units  units of this rank's own prompts by number, whichever rank trains them
    owner        owner rank of a unit's prompt, by the unit's number
    """

    packs: list[Pack]
    cost: PackCost
    longest: int
    local_units: dict[int, ScoredUnit]
    owner: list[int]


def make_packs(
    batches: list[PromptBatch], flops: Flops, *, max_tokens: int, world: World, share: bool, merge: bool
) -> StepPacks:
    """Pack the trees of an optimizer step and distribute the packs by FLOPs. All ranks must call it.

    Args:
        batches: This rank's prompts; those of all ranks, by rank, are the step's.
        flops: Cost of a unit.
        max_tokens: Token budget of a pack.
        world: All ranks.
        share: Compute shared prefixes once.
        merge: Also compute equal beginnings of a prompt's rollouts once.
    """
    trees = [tree for batch in batches for tree in batch.trees]
    units, tables = _split(merge_trees(trees, share and merge), max_tokens, world, share)
    owner = [rank for rank, table in enumerate(tables) for _ in table]
    table = np.concatenate(tables)
    assignment = assign(table, max_tokens, world.replicas, flops)
    local_units = _with_tokens(units, owner.index(world.rank) if units else 0, assignment, batches)
    own = [assignment.bins[row[world.replica]] for row in assignment.table]
    received = _receive_units(local_units, assignment, owner, own, world)
    packs = []
    for numbers in own:
        members = [received[number] for number in numbers]
        packs.append(Pack(numbers, members, lay_out([part for unit in members for part in unit.parts])))
    unshared = work_of_paths(trees)
    tokens, pairs = np.sum(world.all_gather(np.array(unshared, np.int64), "the size of packs"), 0).tolist()
    cost = _cost(table, assignment, flops, max_tokens, world.replicas)
    cost.tokens_unshared, cost.flops_unshared = tokens, flops(tokens, pairs)
    return StepPacks(packs, cost, int(table[:, 2].max(initial=0)), local_units, owner)


def send_to_owners(packs: StepPacks, values: list[np.ndarray], world: World) -> dict[int, np.ndarray]:
    """Values of supervised tokens, back to the owner rank of their prompt. All ranks must call it.

    Args:
        packs: The packs.
        values: One array [c, n] per pack of this replica, for its n supervised tokens. Ranks that share a pack have zeros
            for what others of them know.
        world: All ranks.

    Returns:
        Number of a unit that this rank owns → [c, n] for its tokens.
    """
    outgoing: list[dict[str, np.ndarray]] = [{} for _ in range(world.size)]
    for pack, array in zip(packs.packs, values, strict=True):
        of_units = split_tokens(array, [unit.supervised for unit in pack.units])
        for number, known in zip(pack.numbers, of_units, strict=True):
            outgoing[packs.owner[number]][str(number)] = known
    found: dict[int, np.ndarray] = {}
    for incoming in world.all_to_all([message or None for message in outgoing], "log-probs"):
        for key, known in (incoming or {}).items():
            number = int(key)
            found[number] = found[number] + known if number in found else known
    return found


def _split(
    trees: Sequence[TokenTree], max_tokens: int, world: World, share: bool
) -> tuple[list[Unit], list[np.ndarray]]:
    """The units of this rank's trees, and the tables of all ranks' units, by rank.

    With fewer units than replicas, trees are split further than the budget requires, in the same way on all ranks.
    """
    budget = max_tokens
    while True:
        units = split_trees(trees, budget, share)
        tables = world.all_gather(cost_table(units), "the size of packs")
        enough = world.replicas == 1 or sum(map(len, tables)) >= world.replicas
        if enough or not share or budget <= 1:
            return units, tables
        budget //= 2


def _with_tokens(
    units: list[Unit], first: int, assignment: Assignment, batches: list[PromptBatch]
) -> dict[int, ScoredUnit]:
    """The units by number, from `first`, each with the supervised tokens of the nodes that its pack owns."""
    scored_of: dict[int, list[tuple[int, ScoredTokens]]] = {}  # by node, each with its place among all
    for place, s in enumerate(s for batch in batches for s in batch.scored):
        if len(s.index):
            scored_of.setdefault(id(s.node), []).append((place, s))
    mine = [n for members in assignment.bins for n in members if first <= n < first + len(units)]
    owned = claim_nodes([units[number - first] for number in mine])
    result = {}
    for number, parts in zip(mine, owned, strict=True):
        nodes = [node for part in parts for sources in part.sources.values() for node in sources]
        found = [entry for node in nodes for entry in scored_of.get(id(node), ())]
        result[number] = ScoredUnit(parts, [s for _, s in sorted(found, key=lambda entry: entry[0])])
    return result


def _receive_units(
    local_units: dict[int, ScoredUnit], assignment: Assignment, owner: list[int], own: list[list[int]], world: World
) -> dict[int, ScoredUnit]:
    """The units of this replica's packs by number, from the owner ranks of their prompts."""
    if world.size == 1:
        return local_units
    replica_of = {n: replica for row in assignment.table for replica, b in enumerate(row) for n in assignment.bins[b]}
    outgoing: list[dict[str, object]] = [{} for _ in range(world.size)]
    kept = {}
    for number, unit in local_units.items():
        message = None
        for place in range(world.sequence_parallel):
            rank = replica_of[number] * world.sequence_parallel + place
            if rank == world.rank:
                kept[number] = unit
            else:
                message = message or to_message(unit)
                outgoing[rank][str(number)] = message
    received = world.all_to_all([message or None for message in outgoing], "the parts of packs")
    for rank, incoming in enumerate(received):
        if rank != world.rank:
            kept |= {int(number): from_message(message) for number, message in (incoming or {}).items()}
    return kept


def _cost(table: np.ndarray, assignment: Assignment, flops: Flops, max_tokens: int, replicas: int) -> PackCost:
    """The cost of all packs, without that of unshared sequences."""
    work = np.array([table[members, :2].sum(0) for members in assignment.bins], np.int64).reshape(-1, 2)
    of_pack = [flops(tokens, pairs) for tokens, pairs in work.tolist()]
    tokens, pairs = work.sum(0).tolist()
    return PackCost(
        tokens=tokens,
        flops=flops(tokens, pairs),
        flops_waited=replicas * sum(max(of_pack[index] for index in row) for row in assignment.table),
        capacity=int(np.maximum(work[:, 0], max_tokens).sum()),
        packs=int((work[:, 0] > 0).sum()),
    )
