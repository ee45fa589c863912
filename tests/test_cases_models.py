"""One truth about a model: trainer and embedded engine against `model(ids).logits`, over families of transformers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import transformers

from pact_fast.batch.packing import pack
from pact_fast.batch.tree import TokenTree
from pact_fast.cli.doctor import doctor
from pact_fast.config import load_config
from pact_fast.errors import PactError
from pact_fast.model import logit_check
from pact_fast.model.build import enable_gradient_checkpointing, make_model, meta_model
from pact_fast.model.forward import paths_forward, tree_forward, unsupported
from pact_fast.model.head import LogitTransform, logit_transform
from pact_fast.model.logit_check import check_logits
from pact_fast.model.modes import update_mode
from pact_fast.rollout.embedded import engine as embedded
from pact_fast.rollout.embedded import slot_cache
from pact_fast.rollout.embedded.builder import unserved
from pact_fast.rollout.embedded.engine import TransformersEngine, engine_logprobs
from pact_fast.rollout.engine import Request
from pact_fast.rollout.registry import engine_builder
from pact_fast.train.run import Trainer
from tests.support.memory import peak_bytes

SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "num_shared_experts": 1,
}  # fmt: skip
HYBRID = {
    "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "shared_intermediate_size": 32,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8,
}  # fmt: skip

SCALED = {  # family → (settings, operation of its class)
    "granite": ({"logits_scaling": 8.0}, LogitTransform(logit_scale=0.125)),
    "granitemoe": ({"logits_scaling": 13.0, **EXPERTS}, LogitTransform(logit_scale=1 / 13)),
    "granitemoeshared": ({"logits_scaling": 6.0, **EXPERTS}, LogitTransform(logit_scale=1 / 6)),
    "granitemoehybrid": ({"logits_scaling": 6.0, **EXPERTS, **HYBRID}, LogitTransform(logit_scale=1 / 6)),
    "cohere": ({"logit_scale": 0.0625}, LogitTransform(logit_scale=0.0625)),
    "cohere2": ({"logit_scale": 0.3, **FULL}, LogitTransform(logit_scale=0.3)),
    "hyperclovax": ({"logits_scaling": 0.125}, LogitTransform(logit_scale=0.125)),
    "minicpm3": ({**MLA, "dim_model_base": 8}, LogitTransform(input_scale=0.25)),
    "gemma2": (
        {"final_logit_softcapping": 4.0, "attn_logit_softcapping": None, **FULL},
        LogitTransform(softcap=4.0),
    ),
    "nanochat": ({"final_logit_softcapping": 15.0}, LogitTransform(softcap=15.0)),
    "vaultgemma": ({"final_logit_softcapping": 5.0}, LogitTransform(softcap=5.0)),
}
SERVED = {  # by the trainer, and by the embedded engine unless `unserved`
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {}, "phi": {}, "phi3": {}, "gemma": {}, "gemma3_text": {}, "olmo": {},
    "olmo2": {}, "olmo3": {}, "smollm3": {}, "starcoder2": {}, "stablelm": {}, "gpt2": {}, "gpt_neox": {},
    "gpt_bigcode": {}, "opt": {}, "bloom": {}, "mpt": {}, "xglm": {}, "biogpt": {}, "persimmon": {}, "glm": {}, "glm4": {},
    "exaone4": {}, "ernie4_5": {}, "arcee": {}, "apertus": {}, "helium": {}, "seed_oss": {}, "hunyuan_v1_dense": {},
    "granite_swa": {}, "bitnet": {}, "jais2": {}, "cwm": {}, "internlm3": {}, "lfm2": {}, "recurrent_gemma": {}, "mamba": {},
    "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS, "mixtral": EXPERTS, "olmoe": EXPERTS, "phimoe": EXPERTS, "glm4_moe": EXPERTS,
    "aria_text": EXPERTS, "gpt_oss": {**EXPERTS, **FULL}, "flex_olmo": EXPERTS, "minimax": EXPERTS, "ernie4_5_moe": EXPERTS,
}  # fmt: skip
REFUSED = {  # family → (settings, reason)
    "nemotron": ({}, "the trainer fails with RuntimeError: .*layers must pass"),
    "doge": ({}, "log-probs of the trainer differ .* nats"),
    "diffllama": ({}, "log-probs of the embedded engine differ .* nats"),
    "modernbert-decoder": ({}, "no scaling or soft-cap of the head's output"),
    "bert": ({"is_decoder": True}, "no scaling or soft-cap"),
    "llama4_text": (EXPERTS, "between decoder and logits cannot be run"),
}
QUICK = ["granite", "gemma2", "qwen2", "bloom", "nemotron"]


def quick(kinds):
    """All kinds, those outside QUICK marked slow."""
    return [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in kinds]


def build(kind: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # away from the symmetric start
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.get_output_embeddings().weight.data *= 3  # logits large enough for a soft-cap to show
    return model


def check(model, **options) -> str:
    engine = None if unserved(model) else lambda *args: engine_logprobs(model, *args)
    return check_logits(model, engine=engine, **options)


def check_both_dtypes(model) -> None:
    """In fp32 and bf16; a model that the embedded engine does not serve is refused in one line where a run begins."""
    report = check(model, autocast=torch.autocast("cpu", torch.bfloat16))
    assert "the trainer within" in report
    reason = unserved(model)
    assert ("embedded engine" in report) == (reason is None)
    builder = engine_builder(load_config("quickstart"))
    if reason is None:
        builder.check_model(model)
        return
    with pytest.raises(PactError, match=r"does not serve this model \(.*use rollout\.engine=vllm") as caught:
        builder.check_model(model)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_at_least_forty_families_are_served():
    assert len({*SCALED, *SERVED}) >= 40
    assert not {*SCALED} & {*SERVED}


@pytest.mark.parametrize("kind", quick(SCALED))
def test_scales_and_soft_caps_are_those_of_the_class(kind):
    settings, expected = SCALED[kind]
    model = build(kind, **settings)
    found = logit_transform(model)
    assert found.softcap == expected.softcap
    assert found.logit_scale == pytest.approx(expected.logit_scale, rel=1e-6)
    assert found.input_scale == pytest.approx(expected.input_scale, rel=1e-6)
    check_both_dtypes(model)


@pytest.mark.parametrize("kind", quick(SERVED))
def test_trainer_and_engine_have_the_models_own_logits(kind):
    check_both_dtypes(build(kind, **SERVED[kind]))


@pytest.mark.parametrize("kind", quick(REFUSED))
def test_what_differs_is_refused_with_the_reason(kind):
    settings, reason = REFUSED[kind]
    with pytest.raises(PactError, match=reason) as caught:
        check(build(kind, **settings))
    assert kind.split("_text")[0] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", quick(["llama", "qwen2_moe", "gpt2", "gemma3_text"]))
def test_roundings_that_a_model_amplifies_are_no_difference(kind, monkeypatch):
    """Trained models have large activations: SmolLM2's own code is 1.1e-4 nats off its logits in fp64."""
    model = build(kind, **SERVED.get(kind, {}))
    difference = max(map(float, re.findall(r"within (\S+) nats", check(model))))
    assert difference > 0
    monkeypatch.setattr(logit_check, "FLOAT32_TOLERANCE", difference / 2)
    monkeypatch.setattr(logit_check, "LARGE_LOGIT", 1e9)
    check(model)
    monkeypatch.setattr(logit_check, "ROUNDINGS", 0)
    with pytest.raises(PactError, match="differ from model"):
        check(model)


@pytest.mark.parametrize("kind", ["granite", "gemma2"])
def test_a_transform_that_is_left_out_is_found(kind, monkeypatch):
    for module in (embedded, logit_check.Policy.__module__):
        target = f"{module}.logit_transform" if isinstance(module, str) else f"{module.__name__}.logit_transform"
        monkeypatch.setattr(target, lambda model: LogitTransform())
    with pytest.raises(PactError, match=r"the trainer differ from .* by [0-9.]+ nats"):
        check(build(kind, **SCALED[kind][0]))


@pytest.mark.parametrize(
    "change",
    [lambda z: z + 1, lambda z: z.clamp(-20, 20), lambda z: -z, lambda z: z * torch.linspace(1, 2, z.shape[-1])],
    ids=["shift", "clamp", "sign", "per entry"],
)
def test_other_transforms_are_refused(change):
    model = build("llama")
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    with pytest.raises(PactError, match="no scaling or soft-cap"):
        logit_transform(model)


def test_the_transform_needs_no_weights():
    model = {"model_type": "granite", **SHAPE, "logits_scaling": 8.0}
    config = load_config("quickstart").model_copy(deep=True)
    config.model.random_init = model
    assert logit_transform(meta_model(config)).logit_scale == 0.125


@pytest.mark.slow
def test_adapters_and_checkpointing_are_checked_as_they_train():
    peft = pytest.importorskip("peft", reason="needs the extra lora: pip install 'pact-fast[lora]'")
    model = build("granite", logits_scaling=8.0)
    enable_gradient_checkpointing(model)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model)
    check_both_dtypes(model)


class Tokenizer(list):
    """As long as a tokenizer."""

    eos_token_id, pad_token_id = 2, 0


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "granite"])  # embeddings of other names, and tied ones
def test_a_tokenizer_larger_than_the_embedding_is_refused(kind):
    check(build(kind), tokenizer=Tokenizer(range(97)))
    with pytest.raises(PactError, match=r"98 tokens, .* 97 rows"):
        check(build(kind), tokenizer=Tokenizer(range(98)))
    model = build(kind)
    model.resize_token_embeddings(98)  # the cure
    check(model, tokenizer=Tokenizer(range(98)))


SMALL_MODEL = {
    key: SHAPE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"model_type": "qwen3"},
            r"num_attention_heads=4 is no multiple of num_key_value_heads=32 \(the default of qwen3\)",
        ),
        ({"model_type": "qwen2"}, "set num_key_value_heads to 4 or a divisor of it"),
        ({"model_type": "mistral"}, r"num_key_value_heads=8 \(the default of mistral\)"),
        ({"model_type": "qwen3", "num_key_value_heads": 3}, "is no multiple of num_key_value_heads=3; set"),
        ({"model_type": "qwen3", "num_key_value_heads": 0}, "is no multiple of num_key_value_heads=0; set"),
        (
            {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 8},
            "exceeds",
        ),
        ({"model_type": "llama", "hidden_size": 30}, r"30\) is not a multiple"),
        ({"model_type": "llama", "hidden_size": "32"}, "expected int, got str"),
        (
            {"model_type": "llama", "hidden_act": "silly"},
            "transformers cannot build this model: KeyError: 'silly'",
        ),
        ({"model_type": "t5"}, "transformers cannot build this model: Unrecognized configuration class"),
        ({"model_type": "qwen99"}, "Unrecognized model identifier"),
    ],
)
def test_sizes_that_do_not_fit_together_are_one_line(settings, words):
    config = load_config("quickstart").model_copy(deep=True)
    config.model.random_init = {**SMALL_MODEL, **settings}
    for build_it in (lambda: make_model(config, Tokenizer(range(97))), lambda: meta_model(config)):
        with pytest.raises(PactError, match=words) as caught:
            build_it()
        assert "\n" not in str(caught.value)


def test_a_default_that_fits_is_left_alone():
    config = load_config("quickstart").model_copy(deep=True)
    for kind in ("llama", "gemma2", "phi3", "glm"):
        config.model.random_init = {**SMALL_MODEL, "model_type": kind}
        check(make_model(config, Tokenizer(range(97))))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_bigcode", "biogpt"])
def test_positions_beyond_a_learned_table_are_refused(kind):
    model = build(kind)
    check(model, longest=64)
    with pytest.raises(PactError, match=r"position [0-9]+ fails with IndexError"):
        check(model, longest=80)


@pytest.mark.slow
@pytest.mark.parametrize("kind, reason", [("nemotron", "the trainer fails"), ("doge", "differ from model")])
def test_doctor_and_train_refuse_alike(kind, reason, tmp_path, capsys):
    settings = [
        f"output_dir={tmp_path / 'run'}",
        f"model.random_init={{model_type: {kind}, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
        "num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 4096}",
    ]
    config = load_config("quickstart", settings)
    assert doctor(config) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL"))
    assert line.startswith("FAIL  logits: ") and reason in line
    with pytest.raises(PactError, match=reason):
        Trainer(config).train()


# -- dropout ---------------------------------------------------------------------------------------------------------

NOISY = {
    "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "attention_dropout": 0.3, "hidden_dropout": 0.3, "dropout": 0.3,
    "layerdrop": 0.5, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3,
}  # fmt: skip


def hidden_states(model) -> torch.Tensor:
    tree = TokenTree()
    root = tree.add(np.arange(3, 12))
    for start in (20, 40):
        tree.add(np.arange(start, start + 6), root)
    share = unsupported(model) is None
    (batch,) = pack([tree], max_tokens=100, share=share)
    return (tree_forward if share else paths_forward)(model, batch)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "kind", ["gpt2", *(pytest.param(k, marks=pytest.mark.slow) for k in ("opt", "mistral", "bloom", "phimoe"))]
)
def test_updates_run_the_policy_that_samples(kind, checkpointing):
    noise = {name: value for name, value in NOISY.items() if hasattr(transformers.AutoConfig.for_model(kind), name)}
    assert noise
    model = build(kind, **noise, **(EXPERTS if kind == "phimoe" else {}))
    expected = hidden_states(model.eval())
    wanted = torch.autograd.grad(expected.square().sum(), model.get_input_embeddings().weight)[0]
    if checkpointing:
        enable_gradient_checkpointing(model)
    update_mode(model)
    given = hidden_states(model)
    gradient = torch.autograd.grad(given.square().sum(), model.get_input_embeddings().weight)[0]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


def test_checkpointing_stays_active_in_the_mode_of_updates():
    model = build("llama")
    enable_gradient_checkpointing(model)
    update_mode(model)
    calls = []
    attention = model.base_model.layers[0].self_attn
    attention.register_forward_hook(lambda *_: calls.append(attention.training))
    hidden_states(model).sum().backward()
    assert calls == [False, False]  # forward, and again in the backward pass
    update_mode(model)
    model.eval()
    hidden_states(model).sum().backward()
    assert len(calls) == 3


# -- the embedded engine ---------------------------------------------------------------------------------------------


def sample(model, prompts, autocast=None):
    engine = TransformersEngine(model, [2], slots=4, autocast=autocast)
    for session, ids in enumerate(prompts):
        engine.submit(Request(session, ids, 5, (0, session)))
    turns = {}
    while len(turns) < len(prompts):
        for done in engine.step():
            turns[done.session] = done
            engine.close(done.session)
    return [turns[i] for i in range(len(prompts))]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "granite", "olmo"])
def test_bf16_sampling_without_norms_on_queries_and_keys(kind):
    """Under autocast the rotary embedding gives fp32 queries and keys, but values are bf16."""
    model, prompts = build(kind).eval(), [np.arange(3, 3 + n) for n in (30, 7, 30, 2)]
    autocast = torch.autocast("cpu", torch.bfloat16)
    for prompt, turn in zip(prompts, sample(model, prompts, autocast), strict=True):
        ids = torch.as_tensor(np.concatenate([prompt, turn.ids]))[None]
        model.set_attn_implementation("sdpa")
        with torch.no_grad(), autocast:
            logp = model(input_ids=ids).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        own = logp.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
        assert np.abs(own - turn.logprobs).max() < 0.15  # bf16 logits of up to 10


@pytest.mark.parametrize("kernel", [True, False])
def test_prefill_in_chunks_changes_nothing(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(slot_cache.cpu, "serves", lambda *_: False)
        monkeypatch.setattr(slot_cache, "QUERY_BLOCK", 3)
    changes = {"head_dim": 16}  # served by the kernel of tree attention
    model, prompts = build("llama", **changes).eval(), [np.arange(3, 3 + n) for n in (50, 7, 31, 2, 41)]
    whole = sample(model, prompts)
    monkeypatch.setattr(embedded, "PREFILL_TOKENS", 16)
    for a, b in zip(whole, sample(model, prompts), strict=True):
        assert np.array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("n, m", [(1, 1), (5, 5), (7, 20), (300, 700)])
@pytest.mark.parametrize("dim", [8, 16])  # in blocks of queries; by the kernel
def test_causal_attention_over_cached_positions(n, m, dim):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, n, dim), torch.randn(1, 2, m, dim), torch.randn(1, 2, m, dim)
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(slot_cache.causal_attention(q, k, v, 0.3), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [True, False])
def test_memory_of_a_prefill_is_linear_in_the_prompt(kernel, monkeypatch):
    """A mask of [prompt, prompt] would make it four times as large; two lengths, so that constants do not hide it."""
    if not kernel:
        monkeypatch.setattr(slot_cache.cpu, "serves", lambda *_: False)
        monkeypatch.setattr(slot_cache, "QUERY_BLOCK", 32)
    monkeypatch.setattr(embedded, "PREFILL_TOKENS", 64)
    model = build("llama", head_dim=16, num_hidden_layers=1, max_position_embeddings=4096).eval()
    small, large = (peak_bytes(lambda n=n: sample(model, [np.arange(n) % 97] * 3)) for n in (512, 1024))
    assert large < 2.5 * small
