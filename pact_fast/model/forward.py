"""Forward passes of Hugging Face decoders on packed trees.

Attention is replaced through transformers' registry, recurrences in the namespace of the model's code
(`recurrence/dispatch.py`), so no model code is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from pact_fast.batch.packing import PackedBatch
from pact_fast.errors import PactError
from pact_fast.model.attention.prefix_cache import PathCache
from pact_fast.model.attention.scores import SlidingWindow
from pact_fast.model.attention.tree import TreeLayout, tree_attention
from pact_fast.model.attention.ulysses import RowShards
from pact_fast.model.patch import fused_kernels
from pact_fast.model.recurrence.dispatch import follows_tree, inside_tree, install, recurrent_layers
from pact_fast.model.rematerialize import Rematerialize, is_compiled

ATTENTION_NAME = "pact_tree"  # in transformers' registry


# kinds of decoder layers as transformers names them
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
RECURRENT_LAYERS = {"linear_attention", "conv", "hybrid"}  # hybrid: attention and a recurrence side by side
POINTWISE_LAYERS = {"mlp", "moe"}


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: SlidingWindow | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    tree_layout: TreeLayout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it. query, key, value: [1, H, T, D]; returns [1, T, H, D]."""
    if tree_layout is None:
        raise RuntimeError(
            "attention 'pact_tree' got no tree_layout: call the model through tree_forward, whose keyword arguments its "
            "layers must pass on"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = attention_mask.size if isinstance(attention_mask, SlidingWindow) else None
    if tree_layout.cache is not None:
        key, value = tree_layout.cache.extend(module.layer_idx, key, value)
    if tree_layout.keep is not None:
        tree_layout.keep.store(module.layer_idx, key, value)
    row_shards = tree_layout.row_shards
    if row_shards is not None:
        query, key, value = row_shards.scatter_heads(query, key, value)
        if s_aux is not None:
            s_aux = s_aux.chunk(row_shards.size)[row_shards.rank]
    out = tree_attention(
        query, key, value, tree_layout, scale=scale, window=window, softcap=softcap or None, sinks=s_aux
    )
    if row_shards is not None:
        out = row_shards.gather_heads(out)
    return out.transpose(1, 2).contiguous(), None


def _mask(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> SlidingWindow | None:
    """A mask as transformers asks for it: only the window of the layers it is for, since the TreeLayout has the tree."""
    if use_vmap:
        raise RuntimeError("the model's code changes the causal mask by a function of its own")
    return None if local_size is None else SlidingWindow(local_size)


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _mask)


def layer_kinds(config: Any) -> list[str]:
    """The kind of every decoder layer, as transformers names them; [] where all are alike."""
    return list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or [])


def unsupported(model: PreTrainedModel) -> str | None:
    """The reason why `tree_forward` cannot compute the model; None if it can."""
    config = model.config.get_text_config()
    kinds = layer_kinds(config)
    unknown = set(kinds) - ATTENTION_LAYERS - RECURRENT_LAYERS - POINTWISE_LAYERS
    if unknown:
        return f"{config.model_type}: has layers of kinds that cannot share prefixes: {', '.join(sorted(unknown))}"
    recurrent = [i for i, kind in enumerate(kinds) if kind in RECURRENT_LAYERS]
    if not recurrent and model._is_stateful:
        return f"{config.model_type}: its recurrent layers are of a kind that cannot share prefixes"
    if recurrent:
        layers = list(getattr(decoder_of(model), "layers", []))
        if len(layers) != len(kinds) or not all(follows_tree(layers[i], kinds[i]) for i in recurrent):
            return f"{config.model_type}: its {kinds[recurrent[0]]} layers are of a kind that cannot share prefixes"
        return None if type(causal_lm_of(model))._can_set_attn_implementation() else _no_attention_function(config)
    return None if model._supports_attention_backend else _no_attention_function(config)


def _no_attention_function(config: Any) -> str:
    return f"{config.model_type}: its transformers code does not take an attention function"


def tree_forward(
    model: PreTrainedModel, batch: PackedBatch, keep: PathCache | None = None, row_shards: RowShards | None = None
) -> torch.Tensor:
    """Hidden states after the final norm, equal to those of every root-to-leaf path run by itself. Differentiable.

    Args:
        model: A causal LM of transformers, also one wrapped by peft.
        batch: A pack of T tokens.
        keep: Where to store the detached keys and values of one path, for `branches_forward`.
        row_shards: Sequence parallelism. Only rows [row_shards.start, row_shards.end) are computed and returned; all
            ranks of the group have to call.

    Returns:
        [T, D] in the model's dtype.

    Raises:
        PactError: Trees cannot be computed for this model, `paths_forward` can; or `keep` or `row_shards` for a model
            with recurrent layers.
    """
    _use_trees(model)
    if (keep is not None or row_shards is not None) and recurrent_layers(model):
        what = (
            "a cached path holds no recurrent states" if keep else "sequence parallelism divides attention heads only"
        )
        raise PactError(f"{model.config.model_type} has recurrent layers, and {what}")
    layout = TreeLayout(batch, next(model.parameters()).device)
    layout.keep, layout.row_shards = keep, row_shards
    hidden = _decoder_forward(model, batch, layout)
    if keep is not None:
        keep.last_hidden = hidden[keep.rows[-1]].detach()
    return hidden


def _use_trees(model: PreTrainedModel) -> None:
    if model.config._attn_implementation == ATTENTION_NAME:
        return
    reason = unsupported(model)
    if reason is not None:
        raise PactError(f"token trees: {reason}; pack with share=False and use paths_forward")
    install(model)
    model.set_attn_implementation(ATTENTION_NAME)


@torch.no_grad()
def branches_forward(model: PreTrainedModel, cache: PathCache, batch: PackedBatch) -> torch.Tensor:
    """Hidden states [T + 1, D], without gradient, of a tree that continues a cached path.

    `batch` packs one tree made as TokenTree(start=len(cache)). Row −1 is the last hidden state of the cached path, so
    that hidden[batch.rows(node)] also predicts the first tokens. Only the branches' own tokens are computed: a teacher
    without gradient is scored on top of the prefix that the student's forward pass has already computed.
    """
    layout = TreeLayout(batch, next(model.parameters()).device, prefix_length=len(cache))
    layout.cache = cache
    return torch.cat([_decoder_forward(model, batch, layout), cache.last_hidden[None]])


def _decoder_forward(model: PreTrainedModel, batch: PackedBatch, layout: TreeLayout) -> torch.Tensor:
    device = next(model.parameters()).device
    decoder = decoder_of(model)
    local_rows = slice(layout.row_shards.start, layout.row_shards.end) if layout.row_shards else slice(None)
    with _pointwise_optimizations(decoder), inside_tree():
        output = decoder(
            input_ids=torch.as_tensor(batch.input_ids[local_rows], device=device)[None],
            position_ids=torch.as_tensor(batch.position_ids[local_rows], device=device)[None],
            tree_layout=layout,
            use_cache=False,
        )
    return output.last_hidden_state[0]


@contextmanager
def _pointwise_optimizations(decoder: torch.nn.Module) -> Iterator[None]:
    """Fused pointwise kernels and rematerialization; neither for a compiled decoder, where the compiler does both."""
    if is_compiled(decoder):
        yield
        return
    with Rematerialize(), fused_kernels(decoder):
        yield


def paths_forward(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Hidden states [T, D] of a pack made with share=False, by the model's own attention on a padded batch of paths.

    For models that `tree_forward` refuses. Paths are padded on the right, where causal attention does not see the
    padding. Raises ValueError for a pack with shared prefixes.
    """
    if any(call.spans for call in batch.calls[1:]):
        raise ValueError("paths_forward needs a pack without shared prefixes: pack(…, share=False)")
    device = next(model.parameters()).device
    ids = torch.as_tensor(batch.input_ids, device=device)
    lengths = [span.q1 - span.q0 for span in batch.calls[0].spans]
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    padded = torch.zeros(mask.shape, dtype=ids.dtype, device=device).masked_scatter(mask, ids)
    output = decoder_of(model)(input_ids=padded, attention_mask=mask.long(), use_cache=False)
    return output.last_hidden_state[mask]


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder below the language-model head: embedding, layers, final norm. Also of a model wrapped by peft."""
    causal_lm = causal_lm_of(model)
    base = causal_lm.base_model
    # the model itself where its class names no attribute of its own as the base model (Llama 4)
    return causal_lm.get_decoder() if base is causal_lm else base


def causal_lm_of(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model itself, also of a model wrapped by peft."""
    get_base_model = getattr(model, "get_base_model", None)  # peft
    return get_base_model() if get_base_model else model
