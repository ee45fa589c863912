"""Decoders with windows, soft-caps, attention sinks and recurrent layers on token trees, against every path alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from benchmarks.recurrences import token_by_token
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.config import AlgorithmConfig, TrainerConfig, load_config
from pact_fast.errors import PactError
from pact_fast.estimate.memory import estimate
from pact_fast.estimate.workload import PackLoad
from pact_fast.model.build import enable_gradient_checkpointing
from pact_fast.model.forward import unsupported
from pact_fast.rollout.registry import engine_builder
from pact_fast.train.learner import Learner
from pact_fast.tree import PrefixCache, TokenTree, pack, tree_forward
from tests.support.groups import lookup_chain_renderer, make_groups, step_context_of
from tests.support.models import DECODERS, SHAPE, make
from tests.support.trees import alone, as_tree, gradients, path_ids, trees

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUICK = ["gpt_oss", "gemma2", "qwen3_5_text", "nemotron_h", "lfm2"]


def every_kind(quick=QUICK):
    """All kinds, those outside of `quick` marked slow."""
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in DECODERS]


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
    weights = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden.device)
    return hidden.detach(), gradients(model, (hidden.double() * weights).sum())


def own_states(model, ids: np.ndarray) -> torch.Tensor:
    return model.base_model(torch.as_tensor(ids, device=model.device)[None]).last_hidden_state[0]


@pytest.mark.parametrize("kind", every_kind())
@pytest.mark.slow
def test_fp32_errors_are_at_most_twice_those_of_transformers(kind):
    """Hidden states and all gradients, against fp64."""
    assert_errors_at_most_twice(kind, "cpu")


@needs_gpu
@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_next", "kimi_linear", "nemotron_h"])
def test_fp32_errors_on_a_gpu_with_the_kernels_that_are_installed(kind):
    """Those of the packages fla, mamba_ssm and causal_conv1d, or transformers' torch code."""
    assert_errors_at_most_twice(kind, "cuda")


def assert_errors_at_most_twice(kind: str, device: str) -> None:
    forest, model = trees(), make(kind).to(device)
    assert unsupported(model) is None
    with token_by_token(model):
        truth = results(model, forest, tree=False)
    small = make(kind).float().to(device)
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


# -- two steps of PACT -----------------------------------------------------------------------------------------------


def two_updates(renderer, kind: str, *, share: bool, resume: bool = False) -> torch.Tensor:
    """All parameters after two optimizer steps on both contexts; `resume`: the second by a new learner."""
    config = AlgorithmConfig(name="pact", anchor={"mode": "blend"})
    trainer = TrainerConfig(share_prefixes=share, learning_rate=1e-3, max_tokens_per_pack=100_000)
    groups = make_groups(renderer, config, prompts=2, rollouts=3)
    algorithm, context = make_algorithm(config), step_context_of(renderer, config, groups)

    def learner_of(model) -> Learner:
        return Learner(model, trainer, algorithm, total_updates=2, temperature=0.8)

    settings = {"vocab_size": len(renderer.tokenizer), "max_position_embeddings": 2048}
    learner = learner_of(make(kind, **settings).float())
    for step in range(2):
        if step and resume:
            saved = {name: tensor.clone() for name, tensor in learner.backend.state()}
            model = make(kind, **settings).float()
            model.load_state_dict(learner.model.state_dict())
            learner, updates = learner_of(model), learner.updates
            learner.backend.load_state(saved)
            learner.updates = updates
        batches = [algorithm.prompt_batch(group, context) for group in groups]
        learner.prepare(batches)
        learner.update(batches)
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_5_text", "gpt_oss", "gemma3_text"])
def test_two_steps_equal_those_without_sharing_and_resume_bit_for_bit(kind):
    renderer = lookup_chain_renderer()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="prefixes are not shared")
        whole = two_updates(renderer, kind, share=True)
    assert torch.equal(two_updates(renderer, kind, share=True, resume=True), whole)
    start = torch.cat([p.flatten() for p in make(kind, vocab_size=len(renderer.tokenizer)).float().parameters()])
    alone = two_updates(renderer, kind, share=False)
    assert (whole - alone).norm() <= 0.01 * (alone - start).norm()  # AdamW's first steps are signs of gradients


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, reason", [("qwen3_5_text", "linear_attention"), ("gemma2", "sliding"), ("gpt_oss", "sink")]
)
def test_the_embedded_engine_refuses_at_the_start_and_names_the_cure(kind, reason):
    model = make(kind, layer_types=["full_attention"] * 2) if kind == "gpt_oss" else make(kind)
    with pytest.raises(PactError, match=rf"does not serve this model \(.*{reason}.*use rollout\.engine=vllm") as caught:
        engine_builder(load_config("quickstart")).check_model(model)
    assert "\n" not in str(caught.value)


def test_recurrent_states_are_neither_kept_nor_divided():
    model = make("qwen3_5_text")
    tree = TokenTree()
    node = tree.add(np.arange(5))
    (batch,) = pack([tree], max_tokens=10)
    with pytest.raises(PactError, match="recurrent layers, and a cached path holds no recurrent states"):
        tree_forward(model, batch, keep=PrefixCache(batch, node))


@pytest.mark.slow
def test_the_memory_estimate_counts_a_state_for_every_branch():
    config = load_config("quickstart").model_copy(deep=True)
    config.model.random_init = {"model_type": "qwen3_5_text", **SHAPE, **DECODERS["qwen3_5_text"]}

    def activations(branches: int) -> int:
        tree = TokenTree()
        stem = tree.add(np.zeros(64, np.int64))
        for _ in range(branches):
            tree.add(np.zeros(32 // branches, np.int64), stem)
        (batch,) = pack([tree], max_tokens=1000)
        return estimate(config, [PackLoad(batch, 16)]).parts["activations"]

    heads, keys, values = 4, 8, 8
    assert activations(32) - activations(1) >= 31 * heads * keys * values * 4
