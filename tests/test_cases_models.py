"""One truth about a model: trainer and embedded engine against `model(ids).logits`, over families of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from pact_fast.errors import PactError
from pact_fast.model.forward import unsupported
from pact_fast.model.logit_check import check_logits
from pact_fast.rollout.embedded.engine import engine_logprobs

SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def build(kind: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # away from the symmetric start; logits large enough for a soft-cap to show
        parameter.data += 0.1 * torch.randn_like(parameter)
    head = model.get_output_embeddings()
    head.weight.data *= 3
    return model


def check(model, **options) -> str:
    engine = None if unsupported(model) else lambda *args: engine_logprobs(model, *args)
    return check_logits(model, engine=engine, **options)
