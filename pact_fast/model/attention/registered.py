"""Tree attention in transformers' registry, as a guest: a model that is called by others computes as it always did.

A model selects attention by a name in its config, and reads it again when gradient checkpointing repeats a layer in the
backward pass. While a tree is computed the name is "pact_tree_" + the name before. Functions under that name do what the
name before does if no tree is passed on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pact_fast.model.attention.scores import SlidingWindow
from pact_fast.model.attention.tree import tree_attention

PREFIX = "pact_tree_"

_before: dict[str, str] = {}  # our name → the name before
_in_tree: ContextVar[bool] = ContextVar("pact_fast_in_tree", default=False)


@contextmanager
def tree_attention_in(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's layers compute tree attention where they are given a `tree_layout`.

    Afterwards the model has its own attention again, unless layers will be repeated in the backward pass: then the name
    stays, with the model's own attention behind it.
    """
    names = {id(m.config): (m.config, m.config._attn_implementation) for m in _transformers_modules(model)}
    model.set_attn_implementation(registered_name(model.config._attn_implementation))
    inside = _in_tree.set(True)
    try:
        yield
    finally:
        _in_tree.reset(inside)
        if not (torch.is_grad_enabled() and _is_checkpointed(model)):
            for config, name in names.values():
                config._attn_implementation_internal = _before.get(name, name)


def _transformers_modules(model: torch.nn.Module) -> list[PreTrainedModel]:
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)]


def _is_checkpointed(model: torch.nn.Module) -> bool:
    """Whether a layer is repeated in the backward pass, by transformers or by a wrapper of torch."""
    return any(
        getattr(m, "gradient_checkpointing", False) or type(m).__name__ == "CheckpointWrapper" for m in model.modules()
    )


def registered_name(before: str | None) -> str:
    """Our name on top of the attention `before`; registered at first use."""
    before = before or "eager"
    if before in _before:
        return before
    name = PREFIX + before.replace("/", "_").replace(":", "_").replace("|", "_")
    if name not in ALL_ATTENTION_FUNCTIONS:
        _before[name] = before
        AttentionInterface.register(name, _attention_over(before))
        AttentionMaskInterface.register(name, _mask_over(before))
    return name


def _attention_over(before: str) -> Any:
    def attention(module, query, key, value, attention_mask, *args, tree_layout=None, **options):
        """As transformers calls it. query, key, value: [1, H, T, D]; returns [1, T, H, D]."""
        if tree_layout is not None:
            window = attention_mask.size if isinstance(attention_mask, SlidingWindow) else None
            return _tree(module, query, key, value, tree_layout, window, **options)
        if _in_tree.get():
            raise RuntimeError(
                "attention got no tree_layout: the model's layers must pass their keyword arguments on, or all branches "
                "would be one sequence"
            )
        # the eager function is the one default that is not in the registry, but beside the layer
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(before, eager)
        return function(module, query, key, value, attention_mask, *args, **options)

    return attention


def _mask_over(before: str) -> Any:
    def mask(*args, **options):
        return _tree_mask(**options) if _in_tree.get() else ALL_MASK_ATTENTION_FUNCTIONS[before](*args, **options)

    return mask


def _tree_mask(local_size: int | None = None, use_vmap: bool = False, **_: Any) -> SlidingWindow | None:
    """Only the window of the layers that a mask is for: a tree is in its layout."""
    if use_vmap:
        raise RuntimeError("the model's code changes the causal mask by a function of its own")
    return None if local_size is None else SlidingWindow(local_size)


def _tree(module, query, key, value, layout, window, scaling=None, softcap=None, s_aux=None, **_):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout.cache is not None:
        key, value = layout.cache.extend(module.layer_idx, key, value)
    if layout.keep is not None:
        layout.keep.store(module.layer_idx, key, value)
    shards = layout.row_shards
    if shards is not None:
        query, key, value = shards.scatter_heads(query, key, value)
        if s_aux is not None:
            s_aux = s_aux.chunk(shards.size)[shards.rank]
    out = tree_attention(query, key, value, layout, scale=scale, window=window, softcap=softcap or None, sinks=s_aux)
    if shards is not None:
        out = shards.gather_heads(out)
    return out.transpose(1, 2).contiguous(), None
