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

EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS = {  # other than full attention in every layer
    "gemma2": WINDOW | {"attn_logit_softcapping": 3.0},
    "gemma3_text": WINDOW,
    "gpt_oss": WINDOW | EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "mistral": {"sliding_window": 4},
    "olmo3": WINDOW,
    "exaone4": WINDOW,
    "cohere2": WINDOW,
    "granite_swa": WINDOW,
    "mimo_v2_flash": WINDOW | EXPERTS | {"v_head_dim": 4},
    "qwen3_next": DELTA | EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | EXPERTS,
    "olmo_hybrid": DELTA | {"pad_token_id": 0},
    "kimi_linear": EXPERTS | {
        "linear_num_heads": 4, "linear_head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "nemotron_h": EXPERTS | {
        "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 4,
        "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
    },
    "granitemoehybrid": EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
}  # fmt: skip

GROUPS = EXPERTS | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
MORE = {  # decoders of docs/models.md that are neither of KINDS nor of DECODERS
    "deepseek_v3": GROUPS | {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gemma4_text": {
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 0,
    },
    "glm4_moe": GROUPS, "minimax_m2": EXPERTS, "glm4": {}, "ministral3": {}, "smollm3": {}, "granite": {},
}  # fmt: skip

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
    settings = {**MORE, **DECODERS, **KINDS}.get(kind, {})
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **settings, **changes})
    # grouped products of experts take no fp64
    options = {"experts_implementation": "eager"} if kind == "qwen3_moe" or EXPERTS.items() <= settings.items() else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **options).double()
    for parameter in model.parameters():  # away from the symmetric start: norms of 1, biases of 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model
