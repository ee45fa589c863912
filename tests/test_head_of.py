"""head_of: the head of Hugging Face models, with adapters, against the models' own logits."""

from __future__ import annotations

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.kernels import head_of, linear_logprob
from tests.support.models import make

IDS = torch.arange(24).view(2, 12) * 7 % 97
KINDS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "phi": {},  # a bias
    "granite": {"logits_scaling": 8.0},
    "nanochat": {"final_logit_softcapping": 5.0},
}


def ours(model):
    """Log-probs of the next tokens through head_of."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(IDS).last_hidden_state[:, :-1].flatten(0, 1)
    head = head_of(model)
    return linear_logprob(head.input(hidden), head.weight, IDS[:, 1:].flatten(), **head.options).logprob


def theirs(model):
    return model(input_ids=IDS).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).flatten()


def check(model):
    """Log-probs and gradients of all trained parameters are those of the model's own logits."""
    trained = [p for p in model.parameters() if p.requires_grad]
    given, expected = ours(model), theirs(model)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.linspace(-1, 1, len(given), dtype=given.dtype)
    gradients = (torch.autograd.grad(z, trained, upstream, allow_unused=True) for z in (given, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def with_lora(name="default", **options):
    import peft

    settings = peft.LoraConfig(
        r=3, lora_alpha=7, init_lora_weights=False, target_modules=["q_proj", "lm_head"], **options
    )
    return peft.get_peft_model(make("llama"), settings, name, autocast_adapter_dtype=False).double()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_those_of_the_models_own_logits(kind):
    check(make(kind, **KINDS[kind]))


def test_lora_on_the_head_is_exact():
    model = with_lora()
    assert head_of(model).weight.shape == (97, 32 + 3)
    check(model)


def test_adapters_count_as_far_as_they_are_active():
    import peft

    model = with_lora()
    model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head"]))
    model.double().base_model.set_adapter(["default", "other"])
    assert head_of(model).weight.shape == (97, 32 + 3 + 2)
    check(model)
    with model.disable_adapter(), torch.no_grad():
        assert head_of(model).weight.shape == (97, 32)
        torch.testing.assert_close(ours(model), theirs(model))
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(ours(model), theirs(model))


def test_a_head_that_peft_trains_as_a_whole():
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(make("llama"), settings, autocast_adapter_dtype=False)
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        trained += 0.1
    check(model)
    with model.disable_adapter():
        assert head_of(model).weight is model.base_model.model.lm_head.original_module.weight


def test_wrapped_models_are_unwrapped():
    model = make("llama")
    assert head_of(torch.compile(model)).weight is model.lm_head.weight
    assert head_of(torch.nn.DataParallel(model)).weight is model.lm_head.weight


def test_hooks_of_the_modules_do_not_run():
    """They gather weights, and would be taken for a training step."""
    model, ran = make("granite", logits_scaling=8.0), []
    for module in (model.model, model.lm_head):
        module.register_forward_pre_hook(lambda *_: ran.append("before"))
        module.register_forward_hook(lambda *_: ran.append("after"))
    assert head_of(model).logit_scale == 0.125 and not ran
    model(input_ids=IDS)
    assert len(ran) == 4


def partitioned(model):
    model.lm_head.weight.ds_shape = torch.Size((97, 32))
    model.lm_head.weight.data = torch.empty(0, dtype=torch.float64)
    return model


def quantized(model):
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(97, 32, dtype=torch.uint8), requires_grad=False)
    return model


def without_head(model):
    model.lm_head = None
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: with_lora(use_dora=True), "a variant of LoRA"),
        (lambda: with_lora(lora_bias=True), "lora_bias=False"),
        (lambda: partitioned(make("llama")), "inside the model's forward"),
        (lambda: quantized(make("llama")), "uint8, quantized"),
        (lambda: without_head(make("llama")), "no linear head"),
    ],
    ids=["dora", "bias", "zero3", "quantized", "none"],
)
def test_what_is_not_supported_is_one_line_with_the_reason(model, reason):
    with pytest.raises(PactError, match=reason) as caught:
        head_of(model())
    assert "\n" not in str(caught.value)
