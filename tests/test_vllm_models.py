"""Other architectures and types: biases, untied heads, experts, bf16, windows, recurrent layers. Served, or refused."""

import importlib.util

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("vllm", reason="vllm is not installed; see docs/rollouts.md")

from pact_fast.cli.main import main
from pact_fast.errors import PactError
from pact_fast.model.weights import WeightMismatch
from pact_fast.rollout.registry import make_engine
from tests.support.model_runs import recipe
from tests.support.runs import assert_same, cut_back, metrics
from tests.support.vllm_engines import largest_gap, make_policy, perturb, prompts, sample

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    max_position_embeddings=1024,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=512, beta_fast=32.0, beta_slow=1.0
)
MIXTURES = {
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, rope_parameters=YARN),
}
DELTA = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=128, linear_value_head_dim=128,
)  # fmt: skip
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
TORCHVISION = importlib.util.find_spec("torchvision") is not None
needs_torchvision = pytest.mark.skipif(
    not TORCHVISION, reason="vLLM imports torchvision for this model; docs/models.md"
)
CASES = {
    "llama, untied": ("llama", dict(tie_word_embeddings=False), "float32", 1e-4),
    "qwen2, biases": ("qwen2", dict(tie_word_embeddings=True), "float32", 1e-4),
    "qwen3 in bf16": ("qwen3", dict(tie_word_embeddings=False), "bfloat16", 0.1),
    "gemma3, windows": ("gemma3_text", dict(tie_word_embeddings=True, **WINDOW), "float32", 1e-4),
    "qwen3_5 in bf16, recurrent layers": ("qwen3_5_text", dict(tie_word_embeddings=False, **DELTA), "bfloat16", 0.1),
}
LOST = {
    "llama": "q_proj",
    "qwen2": "v_proj.bias",
    "qwen3": "lm_head",
    "gemma3_text": "q_norm",
    "qwen3_5_text": "conv1d",
}


@pytest.fixture(scope="module")
def policy():
    return make_policy(trained=False)


def build(kind, vocab, more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=vocab, **SIZES, **more), dtype=torch.float32
    )


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_cannot_be_verified_is_refused(policy, kind):
    """vLLM 0.32's CPU build gives wrong log-probs after experts were reloaded."""
    model = build(kind, len(policy.renderer.tokenizer), MIXTURES[kind])
    engine = make_engine(policy.config, model, policy.renderer)
    try:
        with pytest.raises(PactError, match=r"cannot be verified: model.layers.0.mlp.experts: .* use another engine"):
            engine.update_weights(model, 0)
    finally:
        engine.shutdown()


def cases(names):
    """Parameters; those of Qwen3.5 need a package more."""
    return [pytest.param(name, marks=needs_torchvision) if name.startswith("qwen3_5") else name for name in names]


@pytest.mark.parametrize("case", cases(CASES))
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
        lost = LOST[kind]
        load = engine.transport.load_weights

        def partly(weights, version):
            load(((name, tensor * (1 + 1e-2 * (lost in name))) for name, tensor in weights), version)

        monkeypatch.setattr(engine.transport, "load_weights", partly)
        with pytest.raises(WeightMismatch, match=lost):
            engine.update_weights(model, 2)
    finally:
        engine.shutdown()


def test_linear_attention_in_fp32_is_refused_before_anything_is_sampled(policy):
    """vLLM's CPU kernels of delta rules are in bf16, which an assertion says in the middle of the first turn."""
    model = build("qwen3_5_text", len(policy.renderer.tokenizer), DELTA)
    with pytest.raises(PactError, match=r"linear attention .* in bfloat16 only, .* float32; set model.dtype=bfloat16"):
        make_engine(policy.config, model, policy.renderer)


@pytest.mark.skipif(TORCHVISION, reason="torchvision is installed")
def test_a_package_that_vllm_misses_is_named(policy):
    """vLLM's own error only says that the model `failed to be inspected`."""
    model = build("qwen3_5_text", len(policy.renderer.tokenizer), DELTA)
    config = policy.config.model_copy(deep=True)
    config.model.dtype = "bfloat16"
    with pytest.raises(
        PactError, match=r"does not start with this model: .*No module named 'torchvision.*docs/models.md"
    ):
        make_engine(config, model, policy.renderer)


def test_a_model_that_vllm_cannot_build_is_one_line_with_the_cure(policy):
    plain = MIXTURES["gpt_oss"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # vLLM expects YaRN
    model = build("gpt_oss", len(policy.renderer.tokenizer), plain)
    with pytest.raises(PactError, match=r"vLLM does not start with this model: KeyError: .*; docs/models.md says"):
        make_engine(policy.config, model, policy.renderer)


RUNS = {  # model, settings, largest difference of a log-prob
    "gemma3_text": (dict(head_dim=32), [], 1e-4),
    "qwen3_5_text": (dict(head_dim=32, **DELTA), ["model.dtype=bfloat16"], 0.2),
}


@pytest.mark.parametrize("kind", cases(RUNS))
def test_two_steps_agree_with_the_trainer_and_a_resumed_run_repeats_them(kind, tmp_path):
    changes, more, bound = RUNS[kind]
    settings = [*recipe(tmp_path, kind, **changes), "device=cpu", "rollout.engine=vllm", *more]
    run = tmp_path / "run"
    assert main(["train", *settings, f"output_dir={run}"]) == 0
    steps = [record for record in metrics(run) if "loss" in record]
    assert len({record["loss"] for record in steps}) == 2
    assert max(record["mismatch/max"] for record in steps) < bound
    again = cut_back(run, tmp_path / "resumed", 1)
    assert main(["train", *settings, f"output_dir={again}", "resume=auto"]) == 0
    assert_same(again, run)
