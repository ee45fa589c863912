"""Tree attention inside real decoders: many architectures, checkpointing, compiled layers, autocast, LoRA, small types."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.model.build import enable_gradient_checkpointing
from pact_fast.model.forward import unsupported
from pact_fast.tree import PrefixCache, TokenTree, branches_forward, pack, paths_forward, tree_forward
from tests.support.models import KINDS, make
from tests.support.trees import alone, as_tree, gradients, trees


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_gradients_equal_every_path_alone(kind):
    model, forest = make(kind), trees()
    ours = gradients(model, as_tree(model, forest))
    theirs = gradients(model, alone(model, forest))
    assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


def test_bf16_errors_are_within_twice_those_of_the_models_own_attention():
    model, forest = make("qwen3"), trees()
    truth = gradients(model, alone(model, forest))
    small = make("qwen3").bfloat16()
    error = {
        "tree": (gradients(small, as_tree(small, forest)) - truth).norm(),
        "alone": (gradients(small, alone(small, forest)) - truth).norm(),
    }
    assert error["tree"] <= 2 * error["alone"]


def test_gradient_checkpointing_changes_nothing():
    model, forest = make("qwen3"), trees()
    plain = gradients(model, as_tree(model, forest))
    model.train()
    enable_gradient_checkpointing(model)
    torch.testing.assert_close(gradients(model, as_tree(model, forest)), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_compiled_layer_changes_nothing():
    model, forest = make("qwen3"), trees()
    plain = gradients(model, as_tree(model, forest))
    # the operators of tests/test_ops.py go through Inductor; here it would see only the model's own operators
    model.base_model.layers[0].compile(dynamic=True, backend="aot_eager")
    compiled = gradients(model, as_tree(model, forest))
    assert (compiled - plain).norm() <= 2e-6 * plain.norm()


def test_autocast_computes_as_the_models_own_attention_does():
    model, forest = make("qwen3").float(), trees()
    truth = gradients(model, alone(model, forest))
    with torch.autocast("cpu", torch.bfloat16):
        ours = as_tree(model, forest)
    ours = gradients(model, ours)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = alone(model, forest)
    theirs = gradients(model, theirs)
    assert 0 < (ours - truth).norm() <= 2 * (theirs - truth).norm()


def test_lora_adapters_get_the_gradients_of_every_path_alone():
    peft = pytest.importorskip("peft", reason="needs the extra lora: pip install 'pact-fast[lora]'")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, forest = peft.get_peft_model(make("qwen3"), settings).double(), trees()
    ours = gradients(model, as_tree(model, forest))
    inner = model.get_base_model()
    theirs = gradients(model, alone(inner, forest))
    assert len(ours) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


@pytest.mark.parametrize("kind, reason", [("mamba", "linear_attention layers"), ("bloom", "attention function")])
def test_decoders_without_tree_support_are_refused_with_the_reason_and_computed_path_by_path(kind, reason):
    model, forest = make(kind), trees()
    assert unsupported(model)
    with pytest.raises(PactError, match=reason):
        as_tree(model, forest)
    ours = gradients(model, as_tree(model, forest, share=False, forward=paths_forward))
    theirs = gradients(model, alone(model, forest))
    assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


def test_paths_forward_refuses_a_pack_with_shared_prefixes():
    with pytest.raises(ValueError, match="share=False"):
        paths_forward(make("qwen3"), pack(trees(), max_tokens=60)[0])


@pytest.mark.parametrize("dense", [False, True])
def test_branches_over_a_kept_path_have_the_hidden_states_of_the_whole_tree(dense, monkeypatch):
    """The teacher's stream: rollouts after x → h* over the keys and values that the pass over x → h*, x → {τ} has made."""
    if dense:  # the fallback without a flash kernel
        monkeypatch.setattr("pact_fast.model.attention.tree.select_flash_kernel", lambda q: None)
    model, rng = make("qwen3"), random.Random(5)
    x, h, *rollouts = (np.array([rng.randrange(97) for _ in range(n)]) for n in (7, 5, 4, 1, 6))
    whole = TokenTree()
    root = whole.add(x)
    trace = whole.add(h, root)
    under_trace = [whole.add(y, trace) for y in rollouts]
    (batch,) = pack([whole], max_tokens=1000)
    full = tree_forward(model, batch)

    student = TokenTree()
    root = student.add(x)
    trace = student.add(h, root)
    for y in rollouts:
        student.add(y, root)
    (first,) = pack([student], max_tokens=1000)
    cache = PrefixCache(first, trace)
    tree_forward(model, first, keep=cache)
    teacher = TokenTree(start=len(cache))
    stem = teacher.add([])
    nodes = [teacher.add(y, stem) for y in rollouts]
    (second,) = pack([teacher], max_tokens=1000)
    hidden = branches_forward(model, cache, second)
    assert not hidden.requires_grad and len(second) == sum(map(len, rollouts))
    for node, expected in zip(nodes, under_trace, strict=True):
        given, wanted = hidden[second.rows(node)], full[batch.rows(expected)]
        assert (given - wanted).norm() <= 2e-6 * wanted.norm()
