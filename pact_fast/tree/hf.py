"""Run any Hugging Face decoder on a packed tree, through its attention registry; no model code is copied."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from pact_fast.errors import PactError
from pact_fast.tree.attention import TreeLayout, tree_attention
from pact_fast.tree.packing import PackedBatch

NAME = "pact_tree"


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree_layout=None, **_):
    if tree_layout is None:
        raise RuntimeError("attention 'pact_tree' needs tree_layout=; call the model through tree_forward")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = tree_attention(query, key, value, tree_layout, scale=scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)  # the layout is the mask


def check_supported(model: PreTrainedModel) -> None:
    """PactError with the reason if the model's attention cannot be expressed as a tree."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention"}:
        raise PactError(
            f"{config.model_type}: tree attention needs full attention in every layer, found {', '.join(sorted(kinds))}"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise PactError(f"{config.model_type}: tree attention does not support soft-capped attention scores")


def tree_forward(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Hidden states [T, D] after the final norm: the same numbers as running every root-to-leaf path alone."""
    device = next(model.parameters()).device
    if model.config._attn_implementation != NAME:
        check_supported(model)
        model.set_attn_implementation(NAME)
    output = model.base_model(
        input_ids=torch.as_tensor(batch.input_ids, device=device)[None],
        position_ids=torch.as_tensor(batch.position_ids, device=device)[None],
        tree_layout=TreeLayout(batch, device),
        use_cache=False,
    )
    return output.last_hidden_state[0]
