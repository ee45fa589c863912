"""Run any Hugging Face decoder on a packed tree, through its attention registry; no model code is copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from pact_fast.batch.packing import PackedBatch
from pact_fast.errors import PactError
from pact_fast.model.attention.prefix_cache import PathCache
from pact_fast.model.attention.tree import TreeLayout, tree_attention
from pact_fast.model.attention.ulysses import RowShards
from pact_fast.model.patch import fused_kernels
from pact_fast.model.rematerialize import Rematerialize, is_compiled

NAME = "pact_tree"


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree_layout=None, **_):
    if tree_layout is None:
        raise RuntimeError("attention 'pact_tree' needs tree_layout=; call the model through tree_forward")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if tree_layout.cache is not None:
        key, value = tree_layout.cache.extend(module.layer_idx, key, value)
    if tree_layout.keep is not None:
        tree_layout.keep.store(module.layer_idx, key, value)
    row_shards = tree_layout.row_shards
    if row_shards is not None:
        query, key, value = row_shards.heads(query, key, value)
    out = tree_attention(query, key, value, tree_layout, scale=scale)
    if row_shards is not None:
        out = row_shards.rows(out)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # the layout is the mask


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the model's attention cannot be expressed as a tree; None if it can."""
    config = model.config.get_text_config()
    if not model._supports_attention_backend:
        return f"{config.model_type}: its transformers code does not take an attention function"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention"}:
        return f"{config.model_type}: needs full attention in every layer, found {', '.join(sorted(kinds))}"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        return f"{config.model_type}: attends to a window of {config.sliding_window} tokens"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{config.model_type}: soft-caps its attention scores"
    return None


def tree_forward(
    model: PreTrainedModel, batch: PackedBatch, keep: PathCache | None = None, row_shards: RowShards | None = None
) -> torch.Tensor:
    """Hidden states [T, D] after the final norm: the same numbers as running every root-to-leaf path alone.

    `keep` stores the detached keys and values of one path for `branches_forward`. With `row_shards` (sequence parallelism)
    only rows [row_shards.start, row_shards.end) are computed and returned; all ranks of the group must call.

    `model` may be wrapped by peft. Raises PactError with the reason if its attention cannot be expressed as a tree;
    `paths_forward` serves such models.
    """
    if model.config._attn_implementation != NAME:
        reason = unsupported(model)
        if reason is not None:
            raise PactError(f"tree attention: {reason}; pack with share=False and use paths_forward")
        model.set_attn_implementation(NAME)
    layout = TreeLayout(batch, next(model.parameters()).device)
    layout.keep, layout.row_shards = keep, row_shards
    hidden = _run(model, batch, layout)
    if keep is not None:
        keep.last_hidden = hidden[keep.rows[-1]].detach()
    return hidden


@torch.no_grad()
def branches_forward(model: PreTrainedModel, cache: PathCache, batch: PackedBatch) -> torch.Tensor:
    """Hidden states [T + 1, D], without gradient, of a tree that goes on where a kept path ends.

    `batch` packs one tree made as TokenTree(start=len(cache)). Row −1 is the kept path's last hidden state, so that
    hidden[batch.rows(node)] is right for the first tokens, too. The branches cost their own tokens alone: this is how a
    teacher that takes no gradient is scored over the prefix that the student's pass has computed already.
    """
    layout = TreeLayout(batch, next(model.parameters()).device, after=len(cache))
    layout.cache = cache
    return torch.cat([_run(model, batch, layout), cache.last_hidden[None]])


def _run(model: PreTrainedModel, batch: PackedBatch, layout: TreeLayout) -> torch.Tensor:
    device = next(model.parameters()).device
    decoder = decoder_of(model)
    mine = slice(layout.row_shards.start, layout.row_shards.end) if layout.row_shards else slice(None)
    with _lean(decoder):
        output = decoder(
            input_ids=torch.as_tensor(batch.input_ids[mine], device=device)[None],
            position_ids=torch.as_tensor(batch.position_ids[mine], device=device)[None],
            tree_layout=layout,
            use_cache=False,
        )
    return output.last_hidden_state[0]


@contextmanager
def _lean(decoder: torch.nn.Module) -> Iterator[None]:
    """Pointwise steps in less memory and in fewer passes over it; of compiled code this is the compiler's business."""
    if is_compiled(decoder):
        yield
        return
    with Rematerialize(), fused_kernels(decoder):
        yield


def paths_forward(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Hidden states [T, D] of a pack made with share=False, by the model's own attention on a padded batch of paths.

    For models that tree attention does not serve. Right padding: no path sees it.
    """
    if any(call.spans for call in batch.calls[1:]):
        raise ValueError("paths_forward needs a pack without sharing: pack(…, share=False)")
    device = next(model.parameters()).device
    ids = torch.as_tensor(batch.input_ids, device=device)
    lengths = [span.q1 - span.q0 for span in batch.calls[0].spans]
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    padded = torch.zeros(mask.shape, dtype=ids.dtype, device=device).masked_scatter(mask, ids)
    output = decoder_of(model)(input_ids=padded, attention_mask=mask.long(), use_cache=False)
    return output.last_hidden_state[mask]


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder below the language-model head."""
    get_inner = getattr(model, "get_base_model", None)  # peft
    return (get_inner() if get_inner else model).base_model
