"""The optimizer step through a whole model: splitting, old log-probs, reference, bookkeeping."""

import numpy as np
import pytest
import torch
from helpers import make_groups, toolchain_renderer, update_of
from transformers import AutoConfig, AutoModelForCausalLM

from pact_fast.algorithms import make_algorithm
from pact_fast.config import AlgorithmConfig, TrainerConfig
from pact_fast.trainer.learner import Learner, schedule

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def renderer():
    return toolchain_renderer()


def tiny_model(renderer, kind="qwen3", seed=0):
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=len(renderer.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).double()


def gradients(renderer, model, config, chunks, **trainer) -> torch.Tensor:
    """All parameter gradients of one optimizer step whose plans are handed over in `chunks` of prompts."""
    algorithm = make_algorithm(config)
    groups = make_groups(renderer, config, prompts=4, rollouts=3)
    update = update_of(renderer, config, groups)
    learner = Learner(model, TrainerConfig(**trainer), config, total_updates=1, temperature=TEMPERATURE)
    plans = [algorithm.plan(group, update) for group in groups]
    learner.prepare(plans)
    taken = []
    learner.step = lambda: 0.0  # keep the gradients
    model.zero_grad()
    for start in range(0, len(plans), chunks):
        taken.append(learner.update(plans[start : start + chunks]))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("name", ["pact", "matchtir", "sft"])
def test_every_split_gives_the_same_parameter_gradients(renderer, name, kind):
    config = AlgorithmConfig(name=name, anchor={"mode": "blend"}, entropy_coef=0.01)
    model = tiny_model(renderer, kind)
    whole = gradients(renderer, model, config, 4, max_tokens_per_pack=100_000)
    assert whole.norm() > 1e-4
    for chunks, budget, share in [
        (1, 100_000, True),
        (2, 600, True),
        (4, 256, True),
        (4, 100_000, False),
        (1, 700, False),
    ]:
        split = gradients(renderer, model, config, chunks, max_tokens_per_pack=budget, share_prefixes=share)
        assert (split - whole).norm() <= 2e-6 * whole.norm()


def test_old_logprobs_of_the_current_policy_change_nothing(renderer):
    """The ratio is 1 either way; with old log-probs filled in it is only computed."""
    config = AlgorithmConfig(name="pact", anchor={"mode": "blend"})
    model = tiny_model(renderer)
    algorithm = make_algorithm(config)
    results = []
    for shares in (False, True):
        groups = make_groups(renderer, config, prompts=3, rollouts=2)
        update = update_of(renderer, config, groups)
        learner = Learner(
            model, TrainerConfig(), config, total_updates=1, temperature=TEMPERATURE, shares_batches=shares
        )
        plans = [algorithm.plan(group, update) for group in groups]
        learner.prepare(plans)
        filled = np.concatenate([s.old_logprob for p in plans for s in p.scored if s.stream != 2])
        assert np.isnan(filled).all() != shares
        learner.step = lambda: 0.0
        model.zero_grad()
        learner.update(plans)
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (results[0] - results[1]).norm() <= 1e-5 * results[0].norm()


def test_the_kl_term_pulls_towards_the_reference(renderer):
    config = AlgorithmConfig(name="matchtir", beta=5.0, epsilon=1e-9)
    model, reference = tiny_model(renderer, seed=0).float(), tiny_model(renderer, seed=1).float().requires_grad_(False)
    learner = Learner(model, TrainerConfig(learning_rate=3e-3), config, total_updates=30, reference=reference)
    algorithm = make_algorithm(config)
    groups = make_groups(renderer, config, prompts=2, rollouts=2)
    for group in groups:
        group.advantages = [np.zeros_like(a) for a in group.advantages]
    kl = []
    for step in range(12):
        update = update_of(renderer, config, groups, step=step)
        plans = [algorithm.plan(group, update) for group in groups]
        learner.prepare(plans)
        kl.append(learner.update(plans).loss)
    assert kl[0] > 0 and kl[-1] < 0.7 * kl[0]


def test_learning_rate_schedules():
    assert [schedule(i, 10, "constant", 2) for i in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert schedule(2, 12, "linear", 2) == 1.0 and schedule(12, 12, "linear", 2) == 0.0
    assert schedule(7, 12, "cosine", 2) == pytest.approx(0.5)


def test_sharing_saves_the_tokens_it_reports(renderer):
    config = AlgorithmConfig(name="pact", anchor={"q": 0.0})
    groups = make_groups(renderer, config, prompts=2, rollouts=3)
    update = update_of(renderer, config, groups)
    model = tiny_model(renderer).float()
    algorithm = make_algorithm(config)
    tokens = {}
    for share in (True, False):
        learner = Learner(model, TrainerConfig(share_prefixes=share, learning_rate=1e-9), config, total_updates=2)
        result = learner.update([algorithm.plan(group, update) for group in groups])
        tokens[share] = result.tokens
        assert result.tokens_unshared == sum(
            len(g.prompt_ids) + len(renderer.trace_context(g.task, g.task.expert, "demonstration").ids) + len(t.ids)
            for g in groups for t in g.trajectories
        )  # fmt: skip
    assert tokens[False] == result.tokens_unshared > 2 * tokens[True] * 0.7
