"""Token trees of given lengths, with no text in them, packed as an update packs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pact_fast.config import Config
from pact_fast.tree import PackedBatch, TokenTree, pack


class Lengths(NamedTuple):
    """Tokens of a prompt, of a trace (0: none) and of a rollout with its observations; rollouts of a prompt."""

    prompt: int
    trace: int
    response: int
    rollouts: int


class Load(NamedTuple):
    """A pack, and how many of its tokens are supervised."""

    batch: PackedBatch
    supervised: int


def update_loads(config: Config, lengths: Lengths, prompts: int) -> list[Load]:
    """The packs of an optimizer step on so many prompts, with the routes of the algorithm in their expected shares.

    Nothing is merged, as trainer.merge_rollouts does: what rollouts will have in common is not known, and may be nothing.
    """
    scored: set[int] = set()
    trees = list(_trees(config, lengths, prompts, scored))
    batches = pack(trees, max_tokens=config.trainer.pack_tokens, share=config.trainer.share_prefixes)
    return [Load(batch, sum(len(node.ids) for node in batch.owned if id(node) in scored)) for batch in batches]


def full_load(config: Config, tokens: int) -> Load:
    """A pack of exactly so many tokens: a prompt, and rollouts that are as long as they may get, or shorter."""
    prompt = min(config.rollout.max_prompt_length, tokens // 4)
    rollouts = -(-(tokens - prompt) // config.rollout.max_completion_length)
    tree = TokenTree()
    root = tree.add(_ids(prompt))
    for part in np.array_split(_ids(tokens - prompt), rollouts):
        tree.add(part, root)
    [batch] = pack([tree], max_tokens=tokens)
    return Load(batch, tokens - prompt)


def path_batch(tokens: int) -> PackedBatch:
    """One sequence."""
    tree = TokenTree()
    tree.add(_ids(tokens))
    return pack([tree], max_tokens=tokens)[0]


def _trees(config: Config, lengths: Lengths, prompts: int, scored: set[int]) -> Iterator[TokenTree]:
    """One for each prompt; the nodes that a loss reads are put into `scored`."""
    algorithm = config.algorithm
    traced = lengths.trace > 0 and algorithm.name in ("pact", "sft")
    blend = algorithm.name == "pact" and algorithm.anchor.mode == "blend"
    plain = round(prompts * algorithm.anchor.q) if traced and algorithm.name == "pact" and not blend else 0
    for index in range(prompts):
        tree = TokenTree()
        root = tree.add(_ids(lengths.prompt))
        parents = []
        if not traced or index < plain or blend:
            parents.append(root)
        if traced and index >= plain:
            parents.append(tree.add(_ids(lengths.trace), root))
            scored.add(id(parents[-1]))
        for parent in parents if algorithm.name != "sft" else []:
            scored |= {id(tree.add(_ids(lengths.response), parent)) for _ in range(lengths.rollouts)}
        yield tree


def _ids(count: int) -> np.ndarray:
    return np.zeros(count, np.int64)
