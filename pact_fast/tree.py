"""Prefix sharing: token trees, packing, and tree attention for Hugging Face decoders (docs/tree.md). A public module.

Importing it needs numpy alone; torch and transformers are imported on first access to a function that uses them.
"""

from __future__ import annotations

from typing import Any

from pact_fast.batch.packing import PackedBatch, distribute_packs, pack
from pact_fast.batch.tree import Node, TokenTree

_LAZY = {
    "tree_attention": "pact_fast.model.attention.tree",
    "PrefixCache": "pact_fast.model.attention.prefix_cache",
    "branches_forward": "pact_fast.model.forward",
    "inside_forward": "pact_fast.model.forward",
    "paths_forward": "pact_fast.model.forward",
    "tree_forward": "pact_fast.model.forward",
}

__all__ = ["Node", "PackedBatch", "TokenTree", "distribute_packs", "pack", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
