"""Tiny decoders of many architectures."""

from __future__ import annotations

import torch
import transformers

SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
KINDS = {
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "gemma": {},
    "olmo2": {},
}

TINY = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024,
}  # fmt: skip
# deep enough that activations decide a step's memory, and small enough to run one
DEEP = {
    "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def make(kind: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **KINDS.get(kind, {}), **changes})
    # grouped products of experts take no fp64
    options = {"experts_implementation": "eager"} if kind == "qwen3_moe" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **options).double()
    for parameter in model.parameters():  # away from the symmetric start: norms of 1, biases of 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model
