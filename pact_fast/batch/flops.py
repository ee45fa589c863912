"""What sharing saves: tokens, attention pairs and FLOPs, with prefixes computed once against every path alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from pact_fast.batch.packing import PackedBatch
from pact_fast.batch.tree import TokenTree


class Work(NamedTuple):
    """tokens that the trunk computes; pairs: query-key pairs that attention computes in each layer and head."""

    tokens: int
    pairs: int


def work_of_packs(batches: Sequence[PackedBatch]) -> Work:
    """The pairs follow from the mask: row k is seen by the rows up to the end of its subtree."""
    pairs = sum(int((batch.subtree_end - np.arange(len(batch))).sum()) for batch in batches)
    return Work(sum(len(batch) for batch in batches), pairs)


def work_of_paths(trees: Sequence[TokenTree]) -> Work:
    """Every root-to-leaf path alone."""
    lengths = [leaf.end for tree in trees for leaf in tree.leaves()]
    return Work(sum(lengths), sum(n * (n + 1) // 2 for n in lengths))


def decoder_flops(model: PreTrainedModel, work: Work) -> float:
    """Forward and backward FLOPs of the trunk: 6 for each weight and token (4 for a frozen one), 12·head width for each
    pair and head.

    The head and the embedding are left out, and mixtures of experts count the experts that a token visits.
    """
    per_token, per_pair = flops_per(model)
    return per_token * work.tokens + per_pair * work.pairs


def flops_per(model: PreTrainedModel) -> tuple[float, float]:
    """FLOPs of the trunk for each token, and for each query-key pair."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    visited = config.num_experts_per_tok / experts if experts else 1.0
    weights = sum(
        (6.0 if p.requires_grad else 4.0) * math.prod(_shape(p)) * (visited if ".experts." in name else 1.0)
        for name, p in model.named_parameters()
        if len(_shape(p)) >= 2 and "embed" not in name and "lm_head" not in name
    )
    return weights, 12.0 * config.num_hidden_layers * config.num_attention_heads * head_dim


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Also of a parameter that ZeRO-3 has partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)
