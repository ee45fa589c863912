"""Weights are verified for other architectures and types as well: biases, untied heads, experts, bf16."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")

from pact_fast.errors import PactError
from pact_fast.model.weights import WeightMismatch
from pact_fast.rollout.registry import make_engine
from tests.support.vllm_engines import largest_gap, make_policy, perturb, prompts, sample

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    max_position_embeddings=1024,
)  # fmt: skip
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1)
CASES = {
    "llama, untied": ("llama", dict(tie_word_embeddings=False), "float32", 1e-4),
    "qwen2, biases": ("qwen2", dict(tie_word_embeddings=True), "float32", 1e-4),
    "qwen3 in bf16": ("qwen3", dict(tie_word_embeddings=False), "bfloat16", 0.1),
}


@pytest.fixture(scope="module")
def policy():
    return make_policy(trained=False)


def build(kind, vocab, more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=vocab, **SIZES, **more), dtype=torch.float32
    )


def test_what_cannot_be_verified_is_refused(policy):
    """vLLM 0.32's CPU build gives wrong log-probs after experts were reloaded."""
    model = build("qwen3_moe", len(policy.renderer.tokenizer), MIXTURE)
    engine = make_engine(policy.config, model, policy.renderer)
    try:
        with pytest.raises(PactError, match=r"cannot be verified: model.layers.0.mlp.experts: .* use another engine"):
            engine.update_weights(model, 0)
    finally:
        engine.shutdown()


@pytest.mark.parametrize("case", CASES)
def test_samples_and_fingerprints(policy, case, monkeypatch):
    kind, more, dtype, bound = CASES[case]
    vocab = len(policy.renderer.tokenizer)
    model = build(kind, vocab, more)
    config = policy.config.model_copy(deep=True)
    config.model.dtype = dtype
    engine = make_engine(config, model, policy.renderer)
    try:
        contexts = prompts(vocab)
        for version in range(2):
            perturb(model, 0.02)
            engine.update_weights(model, version)
            assert largest_gap(model, contexts, sample(engine, contexts, 16, version)) <= bound
        lost = {"llama": "q_proj", "qwen2": "v_proj.bias", "qwen3": "lm_head"}[kind]
        load = engine.transport.load_weights

        def partly(weights, version):
            load(((name, tensor * (1 + 1e-2 * (lost in name))) for name, tensor in weights), version)

        monkeypatch.setattr(engine.transport, "load_weights", partly)
        with pytest.raises(WeightMismatch, match=lost):
            engine.update_weights(model, 2)
    finally:
        engine.shutdown()
