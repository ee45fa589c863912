"""Kernels in place of a decoder's layers during inference: same results, hooks stay in use, everything is put back."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from pact_fast.kernels.decoder import skinny
from pact_fast.kernels.runtime import build
from pact_fast.model.inference import InferenceKernels


@pytest.fixture(autouse=True)
def library():
    if (status := build.status()) != "ready":
        pytest.skip(f"no C++ library: {status}")


@pytest.fixture
def decoder() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().model


def hidden(decoder: torch.nn.Module, tokens: int) -> torch.Tensor:
    return decoder(input_ids=torch.arange(tokens)[None] % 50, use_cache=False).last_hidden_state


@pytest.mark.parametrize("tokens", [3, 40])  # few rows; more than the kernel serves
@pytest.mark.parametrize("dtype, autocast", [("float32", False), ("bfloat16", False), ("float32", True)])
@torch.inference_mode()
def test_hidden_states_are_those_of_the_models_own_code(decoder, tokens, dtype, autocast):
    decoder.to(getattr(torch, dtype))
    rounds = autocast or dtype == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = hidden(decoder, tokens)
        with InferenceKernels(decoder):
            given = hidden(decoder, tokens)
    assert given.dtype == expected.dtype
    error = (given.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < (3e-2 if rounds else 1e-5)


@torch.inference_mode()
def test_the_kernels_run_within_the_context_only(decoder, monkeypatch):
    calls = []
    linear = skinny.linear
    monkeypatch.setattr(skinny, "linear", lambda *args: calls.append(args) or linear(*args))
    before = {name: dict(vars(module)) for name, module in decoder.named_modules()}
    rotary, kernels = modeling_llama.apply_rotary_pos_emb, InferenceKernels(decoder)
    for _ in range(2):  # a step enters again
        with pytest.raises(KeyError), kernels:
            hidden(decoder, 3)
            raise KeyError
    assert len(calls) == 2 * 2 * 7  # steps, layers, linear layers
    assert {name: dict(vars(module)) for name, module in decoder.named_modules()} == before
    assert modeling_llama.apply_rotary_pos_emb is rotary
    hidden(decoder, 3)
    assert len(calls) == 2 * 2 * 7


@torch.inference_mode()
def test_hooks_and_replaced_forwards_stay_in_use(decoder):
    seen = []
    layer = decoder.layers[0]
    layer.mlp.gate_proj.register_forward_hook(lambda module, args, out: seen.append("hook") or 0 * out)
    layer.mlp.down_proj.forward = lambda x: seen.append("forward") or torch.zeros(*x.shape[:-1], 32)
    expected, calls = hidden(decoder, 3), list(seen)
    with InferenceKernels(decoder):
        torch.testing.assert_close(hidden(decoder, 3), expected)
    assert calls == ["hook", "forward"] and seen == calls * 2


def test_a_compiled_decoder_is_left_to_the_compiler(decoder):
    decoder.layers[0]._compiled_call_impl = decoder.layers[0]._call_impl
    with InferenceKernels(decoder):
        assert all("forward" not in vars(module) for module in decoder.modules())
