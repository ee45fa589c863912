"""tree_forward inside a host's model: before, between and after, the model's own results do not change."""

from __future__ import annotations

import json

import pytest
import torch

from pact_fast.kernels import head_of, linear_logprob
from pact_fast.tree import TokenTree, inside_forward, pack, tree_forward
from tests.support.models import make
from tests.support.trees import as_tree, gradients, trees

IDS = torch.arange(20).view(2, 10) * 3 % 97


def logits(model) -> torch.Tensor:
    """Logits of a padded batch."""
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=mask).logits[mask.bool()]


def outputs(model) -> list[torch.Tensor]:
    """Logits, and what a greedy decoding with the cache says."""
    return [logits(model), model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)]


def same(given, expected):
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_can_be_used_before_between_and_after(attention, checkpointing, tmp_path):
    model = make("llama")
    model.set_attn_implementation(attention)
    expected = outputs(model)
    clean = gradients(model, as_tree(model, trees()))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    total = as_tree(model, trees())
    assert (model.config._attn_implementation == attention) is not checkpointing
    if not checkpointing:  # which switches the cache of generate off
        same(outputs(model), expected)
    logits = model(input_ids=IDS[:1]).logits.sum()  # between forward and backward, with a graph of its own
    torch.testing.assert_close(gradients(model, total), clean)
    logits.backward()
    model.gradient_checkpointing_disable()
    same(outputs(model.eval()), expected)
    with torch.no_grad():
        as_tree(model, trees())
    assert model.config._attn_implementation == attention
    model.save_pretrained(tmp_path)
    assert "pact_tree" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


@pytest.mark.slow
def test_a_compiled_decoder_serves_both():
    model = make("llama", num_hidden_layers=1)
    expected, clean = logits(model), gradients(model, as_tree(model, trees()[:1]))
    model.base_model.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(gradients(model, as_tree(model, trees()[:1])), clean)
        same([logits(model)], [expected])


def test_inside_forward_returns_what_the_function_does_and_leaves_nothing_behind():
    model = make("llama")
    wrapped = torch.nn.DataParallel(model)  # a wrapper without devices only calls its module
    tree = TokenTree()
    tree.add(list(range(9)))
    (batch,) = pack([tree], max_tokens=99)

    def logprob():
        head, hidden = head_of(model), tree_forward(wrapped, batch)
        return linear_logprob(head.input(hidden[:-1]), head.weight, torch.arange(1, 9)).logprob

    expected = model(torch.arange(9)[None]).logits[0, :-1].log_softmax(-1).gather(-1, torch.arange(1, 9)[:, None])[:, 0]
    torch.testing.assert_close(inside_forward(wrapped, logprob), expected)
    assert "forward" not in vars(model)
    with pytest.raises(ZeroDivisionError):
        inside_forward(wrapped, lambda: 1 / 0)
    assert "forward" not in vars(model)


def test_layers_that_drop_the_layout_are_an_error_rather_than_another_attention():
    model = make("llama")
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, tree_layout=None, **options: own(*args, **options)
    with pytest.raises(RuntimeError, match="got no tree_layout"):
        as_tree(model, trees()[:1])
    assert model(IDS).logits.isfinite().all()
