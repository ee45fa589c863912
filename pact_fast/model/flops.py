"""FLOPs of a Hugging Face decoder from the amount of work (`batch/flops.py`)."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from pact_fast.batch.flops import Work
from pact_fast.kernels.head.logit_transform import full_shape


def decoder_flops(model: PreTrainedModel, work: Work) -> float:
    """Forward and backward FLOPs of the decoder, without embedding and language-model head."""
    per_token, per_pair = flops_per_token_and_pair(model)
    return per_token * work.tokens + per_pair * work.pairs


def flops_per_token_and_pair(model: PreTrainedModel) -> tuple[float, float]:
    """Forward and backward FLOPs for each token, and for each query-key pair over all layers and heads.

    A weight costs 6 FLOPs per token (2 forward, 2 for the gradient of its input, 2 for its own gradient) or, if it is
    frozen, 4. A pair costs 12·head_dim in each layer and head: QKᵀ and PV with 4·head_dim forward, twice that backward;
    recomputation in flash attention is not counted. In mixtures of experts only the experts that a token is routed to
    count. Layers without attention have no pairs; windows are not counted, and neither are recurrent states.
    """
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    active_fraction = config.num_experts_per_tok / experts if experts else 1.0
    per_token = sum(
        (6.0 if p.requires_grad else 4.0) * math.prod(full_shape(p)) * (active_fraction if ".experts." in name else 1.0)
        for name, p in model.named_parameters()
        if len(full_shape(p)) >= 2 and "embed" not in name and "lm_head" not in name
    )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    attending = sum(kind not in ("linear_attention", "conv", "mlp", "moe") for kind in kinds)
    return per_token, 12.0 * attending * config.num_attention_heads * head_dim
