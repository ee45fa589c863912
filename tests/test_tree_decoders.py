"""Decoders with windows, soft-caps, attention sinks and recurrent layers on token trees, against every path alone."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from pact_fast.model.build import enable_gradient_checkpointing
from pact_fast.model.forward import unsupported
from pact_fast.model.recurrence.dispatch import _called, recurrent_layers
from pact_fast.tree import pack, tree_forward
from tests.support import recurrences
from tests.support.models import DECODERS, make
from tests.support.trees import alone, as_tree, gradients, path_ids, trees

QUICK = ["gpt_oss", "gemma2", "qwen3_5_text", "nemotron_h", "lfm2"]
RECURRENT = [
    kind for kind in DECODERS if kind not in {"gemma2", "gemma3_text", "gpt_oss", "mistral", "olmo3", "exaone4"}
]
ORACLES = {
    "torch_chunk_gated_delta_rule": recurrences.delta_rule,
    "chunk_kimi_delta_attention": recurrences.delta_rule,
    "mamba2_chunk_scan": recurrences.state_space_scan,
    "causal_conv1d_fn": recurrences.convolution,
}


def every_kind(quick=QUICK):
    """All kinds, those outside of `quick` marked slow."""
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in DECODERS]


def token_by_token(model, monkeypatch) -> None:
    """Recurrences of the model's own code as plain loops, which compute in fp64 where transformers casts to fp32."""
    for layer in recurrent_layers(model):
        namespace = inspect.unwrap(type(layer).forward).__globals__
        for name in _called(type(layer)) & ORACLES.keys():
            monkeypatch.setitem(namespace, name, ORACLES[name])


def results(model, forest, *, tree: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of every token of every node [N, D], and the gradient of a sum of them by all parameters."""
    if tree:
        (batch,) = pack(forest, max_tokens=1000)
        hidden = tree_forward(model, batch)
        hidden = torch.cat([hidden[batch.path_rows(node)[node.start :]] for t in forest for node in t.nodes])
    else:
        model.set_attn_implementation("eager")
        nodes = [node for t in forest for node in t.nodes if len(node.ids)]
        hidden = torch.cat([own_states(model, path_ids(node))[node.start :] for node in nodes])
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    return hidden.detach(), gradients(model, (hidden.double() * weights).sum())


def own_states(model, ids: np.ndarray) -> torch.Tensor:
    return model.base_model(torch.as_tensor(ids)[None]).last_hidden_state[0]


@pytest.mark.parametrize("kind", every_kind())
def test_fp32_errors_are_at_most_twice_those_of_transformers(kind, monkeypatch):
    """Hidden states and all gradients, against fp64."""
    forest, model = trees(), make(kind)
    assert unsupported(model) is None
    with monkeypatch.context() as patch:
        token_by_token(model, patch)
        truth = results(model, forest, tree=False)
    small = make(kind).float()
    theirs, ours = (results(small, forest, tree=tree) for tree in (False, True))
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert a.shape == exact.shape
        assert (a - exact).norm() <= 2 * (b - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("kind", ["qwen3_5_text", "gpt_oss", "nemotron_h", "lfm2"])
def test_gradient_checkpointing_changes_nothing(kind):
    model, forest = make(kind), trees()
    plain = gradients(model, as_tree(model, forest))
    model.train()
    enable_gradient_checkpointing(model)
    torch.testing.assert_close(gradients(model, as_tree(model, forest)), plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "gpt_oss"])
def test_bf16_errors_are_within_twice_those_of_the_models_own_code(kind):
    model, forest = make(kind), trees()
    truth = gradients(model, alone(model, forest))
    small = make(kind).bfloat16()
    ours = (gradients(small, as_tree(small, forest)) - truth).norm()
    assert ours <= 2 * (gradients(small, alone(small, forest)) - truth).norm()


def test_lora_adapters_get_the_gradients_of_every_path_alone():
    peft = pytest.importorskip("peft", reason="needs the extra lora: pip install 'pact-fast[lora]'")
    targets = ["q_proj", "in_proj_qkv", "out_proj"]
    settings = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model, forest = peft.get_peft_model(make("qwen3_5_text"), settings).double(), trees()
    ours = gradients(model, as_tree(model, forest))
    theirs = gradients(model, alone(model.get_base_model(), forest))
    assert len(ours) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (ours - theirs).norm() <= 5e-6 * theirs.norm()
