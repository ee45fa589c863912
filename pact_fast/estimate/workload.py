"""Workloads for estimates: token trees of given lengths, without text, packed as an update packs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.batch.packing import PackedBatch, pack
from pact_fast.batch.tree import TokenTree
from pact_fast.components import LossContext
from pact_fast.config import Config


class Lengths(NamedTuple):
    """Lengths of a workload.

    prompt    tokens of a prompt
    trace     tokens of an expert trace, 0 for none
    response  tokens of a rollout, observations included
    rollouts  rollouts per prompt
    """

    prompt: int
    trace: int
    response: int
    rollouts: int


class PackLoad(NamedTuple):
    """A pack and the number of its supervised tokens."""

    batch: PackedBatch
    supervised: int


def update_loads(config: Config, lengths: Lengths, prompts: int) -> list[PackLoad]:
    """The packs of an optimizer step on `prompts` prompts, with the algorithm's routes in their expected fractions.

    Rollouts are not merged (`trainer.merge_rollouts`): how much of their start they will have in common is unknown.
    """
    scored: set[int] = set()
    trees = list(_trees(config, lengths, prompts, scored))
    batches = pack(trees, max_tokens=config.trainer.pack_tokens, share=config.trainer.share_prefixes)
    return [PackLoad(batch, sum(len(node.ids) for node in batch.owned if id(node) in scored)) for batch in batches]


def full_load(config: Config, tokens: int) -> PackLoad:
    """A pack of exactly `tokens` tokens: a prompt, and rollouts of at most the longest allowed length."""
    prompt = min(config.rollout.max_prompt_length, tokens // 4)
    rollouts = -(-(tokens - prompt) // config.rollout.max_completion_length)
    tree = TokenTree()
    root = tree.add(_ids(prompt))
    for part in np.array_split(_ids(tokens - prompt), rollouts):
        tree.add(part, root)
    [batch] = pack([tree], max_tokens=tokens)
    return PackLoad(batch, tokens - prompt)


def path_batch(tokens: int) -> PackedBatch:
    """A pack of one sequence of `tokens` tokens."""
    tree = TokenTree()
    tree.add(_ids(tokens))
    return pack([tree], max_tokens=tokens)[0]


def _trees(config: Config, lengths: Lengths, prompts: int, scored: set[int]) -> Iterator[TokenTree]:
    """One tree per prompt. Ids of the supervised nodes are added to `scored`."""
    routes = make_algorithm(config.algorithm).routes(with_trace=lengths.trace > 0)
    ends = np.round(prompts * np.cumsum([route.fraction for route in routes]))
    for index in range(prompts):
        contexts = routes[int(np.searchsorted(ends, index, side="right"))].contexts
        tree = TokenTree()
        root = tree.add(_ids(lengths.prompt))
        parents = [root] if LossContext.PROMPT in contexts else []
        if contexts & {LossContext.TRACE, LossContext.EXPERT}:
            trace = tree.add(_ids(lengths.trace), root)
            if LossContext.EXPERT in contexts:
                scored.add(id(trace))
            if LossContext.TRACE in contexts:
                parents.append(trace)
        for parent in parents:
            scored |= {id(tree.add(_ids(lengths.response), parent)) for _ in range(lengths.rollouts)}
        yield tree


def _ids(count: int) -> np.ndarray:
    return np.zeros(count, np.int64)
