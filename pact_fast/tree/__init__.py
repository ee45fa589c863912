"""Shared prefixes, computed once: token trees, packing, tree attention and the Hugging Face hook."""

from pact_fast.tree.packing import PackedBatch, deal, pack
from pact_fast.tree.tree import Node, TokenTree

__all__ = [
    "Node",
    "PackedBatch",
    "PathCache",
    "TokenTree",
    "branches_forward",
    "deal",
    "pack",
    "paths_forward",
    "tree_attention",
    "tree_forward",
]


def __getattr__(name: str):
    # torch and transformers load only when the attention is used
    if name == "tree_attention":
        from pact_fast.tree.attention import tree_attention

        return tree_attention
    if name == "PathCache":
        from pact_fast.tree.cache import PathCache

        return PathCache
    if name in ("branches_forward", "paths_forward", "tree_forward"):
        from pact_fast.tree import hf

        return getattr(hf, name)
    raise AttributeError(name)
