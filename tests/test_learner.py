"""The optimizer step through a whole model: splitting, old log-probs, reference, bookkeeping."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.config import AlgorithmConfig, TrainerConfig
from pact_fast.config.filters import SamplingFilters
from pact_fast.errors import PactError
from pact_fast.model.filters import filtered
from pact_fast.train.learner import Learner
from pact_fast.train.schedule import lr_factor
from tests.support.groups import lookup_chain_renderer, make_groups, step_context_of

TEMPERATURE = 0.8
PROMPTS = 3
# chunks of prompts, tokens of a pack, share, merge: the last two in all combinations, and packs small, middling and whole
SPLITS = [
    (1, 100_000, True, False), (2, 600, True, True), (3, 256, True, False), (3, 100_000, False, True), (1, 700, False, False),
]  # fmt: skip


@pytest.fixture(scope="module")
def renderer():
    return lookup_chain_renderer()


def tiny_model(renderer, kind="qwen3", seed=0):
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=len(renderer.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).double()


def gradients(renderer, model, config, chunks, **trainer) -> torch.Tensor:
    """All parameter gradients of one optimizer step whose batches are handed over in `chunks` of prompts."""
    algorithm = make_algorithm(config)
    groups = make_groups(renderer, config, prompts=PROMPTS, rollouts=3)
    update = step_context_of(renderer, config, groups)
    learner = Learner(model, TrainerConfig(**trainer), make_algorithm(config), total_updates=1, temperature=TEMPERATURE)
    batches = algorithm.prompt_batches(groups, update)
    learner.prepare(batches)
    model.zero_grad()
    for start in range(0, len(batches), chunks):
        learner.accumulate(batches[start : start + chunks])
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "name, message", [("dapo", "unknown policy loss 'dapo'"), ("gspo", "'gspo' takes one ratio per sequence")]
)
def test_policy_losses_that_the_trainer_cannot_use_are_refused_before_the_first_step(renderer, name, message):
    algorithm = make_algorithm(AlgorithmConfig(policy_loss=name))
    with pytest.raises(PactError, match=message):
        Learner(tiny_model(renderer), TrainerConfig(), algorithm, total_updates=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind",
    [(name, "qwen3") for name in ("pact", "matchtir", "sft", "chord", "luffy", "hpt", "sdft")] + [("pact", "llama")],
)
def test_every_split_gives_the_same_parameter_gradients(renderer, name, kind):
    by_tokens = {"loss_type": "dapo"} if name in ("chord", "luffy") else {}
    config = AlgorithmConfig(name=name, anchor={"mode": "blend"}, entropy_coef=0.01, **by_tokens)
    model = tiny_model(renderer, kind)
    whole = gradients(renderer, model, config, PROMPTS, max_tokens_per_pack=100_000)
    assert whole.norm() > 1e-4
    for chunks, budget, share, merge in SPLITS:
        settings = {"max_tokens_per_pack": budget, "share_prefixes": share, "merge_rollouts": merge}
        split = gradients(renderer, model, config, chunks, **settings)
        assert (split - whole).norm() <= 2e-6 * whole.norm()


def test_old_logprobs_of_the_current_policy_change_nothing(renderer):
    """The ratio is 1 either way; with old log-probs filled in it is only computed."""
    config = AlgorithmConfig(name="pact", anchor={"mode": "blend"})
    model = tiny_model(renderer)
    algorithm = make_algorithm(config)
    results = []
    for updates in (1, 2):
        groups = make_groups(renderer, config, prompts=3, rollouts=2)
        update = step_context_of(renderer, config, groups)
        learner = Learner(
            model, TrainerConfig(), algorithm, total_updates=1, temperature=TEMPERATURE, updates_per_batch=updates
        )
        batches = [algorithm.prompt_batch(group, update) for group in groups]
        learner.prepare(batches)
        filled = np.concatenate([s.old_logprob for b in batches for s in b.scored if s.context != 2])
        assert np.isnan(filled).all() == (updates == 1)
        model.zero_grad()
        learner.accumulate(batches)
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (results[0] - results[1]).norm() <= 1e-5 * results[0].norm()


def truncated_logprobs(model, trajectory, filters) -> np.ndarray:
    """Compute the log-probs of a sampler with filters in fp64, normalised over the kept tokens; NaN: not sampled."""
    ids = torch.as_tensor(np.concatenate([trajectory.prompt_ids, trajectory.ids]))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(trajectory.prompt_ids) - 1 : -1].double() / TEMPERATURE
    target = ids[len(trajectory.prompt_ids) :, None]
    logp = logits.log_softmax(-1).gather(1, target)
    kept = filtered(logits, filters).scatter(1, target, logits.gather(1, target)).log_softmax(-1).gather(1, target)
    assert (kept - logp).mean() > 0.3  # the filters keep little, so comparing with the whole vocabulary would show
    return torch.where(torch.as_tensor(trajectory.sampled), kept[:, 0], torch.nan).numpy().astype(np.float32)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_trainer_and_sampler_are_compared_over_the_tokens_that_the_filters_keep(renderer, updates, mode):
    """The very policy that sampled: no mismatch, importance weights 1, and the gradient without a correction."""
    filters = SamplingFilters(top_p=0.6, top_k=200)
    model = tiny_model(renderer)
    results = []
    for correction in (True, False):
        config = AlgorithmConfig(
            name="matchtir", vllm_importance_sampling_correction=correction, vllm_importance_sampling_mode=mode
        )
        groups = make_groups(renderer, config, prompts=2, rollouts=2)
        for t in (t for group in groups for t in group.trajectories):
            t.logprobs = truncated_logprobs(model, t, filters)
        algorithm = make_algorithm(config)
        update = step_context_of(renderer, config, groups)
        learner = Learner(
            model, TrainerConfig(), algorithm, total_updates=1, temperature=TEMPERATURE, filters=filters,
            updates_per_batch=updates, sampler_differs=True,
        )  # fmt: skip
        batches = [algorithm.prompt_batch(group, update) for group in groups]
        learner.prepare(batches)
        if correction and mode == "sequence_mask":
            np.testing.assert_allclose(np.concatenate([s.importance for b in batches for s in b.scored]), 1, atol=1e-3)
        model.zero_grad()
        diff = np.concatenate(learner.accumulate(batches).logprob_diff)[:, 1]
        assert len(diff) > 100 and np.abs(diff).max() < 1e-5
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (results[0] - results[1]).norm() <= 1e-3 * results[1].norm() > 0


def test_the_kl_term_pulls_towards_the_reference(renderer):
    config = AlgorithmConfig(name="matchtir", beta=5.0, epsilon=1e-9)
    model, reference = tiny_model(renderer, seed=0).float(), tiny_model(renderer, seed=1).float().requires_grad_(False)
    learner = Learner(
        model, TrainerConfig(learning_rate=3e-3), make_algorithm(config), total_updates=30, reference=reference
    )
    algorithm = make_algorithm(config)
    groups = make_groups(renderer, config, prompts=2, rollouts=2)
    for group in groups:
        group.advantages = [np.zeros_like(a) for a in group.advantages]
    kl = []
    for step in range(12):
        update = step_context_of(renderer, config, groups, step=step)
        batches = [algorithm.prompt_batch(group, update) for group in groups]
        learner.prepare(batches)
        kl.append(learner.update(batches).loss)
    assert kl[0] > 0 and kl[-1] < 0.7 * kl[0]


def test_learning_rate_schedules():
    assert [lr_factor(i, 10, "constant", 2) for i in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert lr_factor(2, 12, "linear", 2) == 1.0 and lr_factor(12, 12, "linear", 2) == 0.0
    assert lr_factor(7, 12, "cosine", 2) == pytest.approx(0.5)


def test_sharing_saves_the_tokens_it_reports(renderer):
    config = AlgorithmConfig(name="pact", anchor={"q": 0.0})
    groups = make_groups(renderer, config, prompts=2, rollouts=3)
    update = step_context_of(renderer, config, groups)
    model = tiny_model(renderer).float()
    algorithm = make_algorithm(config)
    tokens = {}
    for share in (True, False):
        learner = Learner(
            model, TrainerConfig(share_prefixes=share, learning_rate=1e-9), make_algorithm(config), total_updates=2
        )
        result = learner.update([algorithm.prompt_batch(group, update) for group in groups])
        tokens[share] = result.tokens
        assert result.tokens_unshared == sum(
            len(g.prompt_ids) + len(renderer.trace_context(g.task, g.task.expert, "demonstration").ids) + len(t.ids)
            for g in groups for t in g.trajectories
        )  # fmt: skip
    assert tokens[False] == result.tokens_unshared > 2 * tokens[True] * 0.7


def test_merging_saves_the_tokens_that_rollouts_begin_with(renderer):
    """Every rollout twice: of two, one is computed, as the metrics show; the loss is the same."""
    config = AlgorithmConfig(name="matchtir")
    groups = make_groups(renderer, config, prompts=2, rollouts=2)
    for group in groups:
        group.trajectories, group.advantages = 2 * group.trajectories, 2 * group.advantages
    model, algorithm, found = tiny_model(renderer).float(), make_algorithm(config), {}
    update = step_context_of(renderer, config, groups)
    for merge in (True, False):
        learner = Learner(model, TrainerConfig(merge_rollouts=merge), make_algorithm(config), total_updates=1)
        found[merge] = learner.accumulate([algorithm.prompt_batch(group, update) for group in groups])
    twice = sum(len(t.ids) for group in groups for t in group.trajectories[:2])
    assert found[True].tokens <= found[False].tokens - twice
    assert found[True].flops < found[False].flops and found[True].supervised == found[False].supervised
    assert found[True].loss == pytest.approx(found[False].loss, rel=1e-5)


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.slow
def test_a_pack_that_does_not_fit_is_split_and_the_gradient_stays(renderer, when, monkeypatch):
    """Packs of more than 700 tokens run out of memory, in the backward pass after half of it is done."""
    config = AlgorithmConfig(anchor={"mode": "blend"})
    algorithm = make_algorithm(config)
    groups = make_groups(renderer, config, prompts=4, rollouts=3)
    batches = [algorithm.prompt_batch(group, step_context_of(renderer, config, groups)) for group in groups]
    found, packs = [], []
    for limit in (math.inf, 700):
        model = tiny_model(renderer)
        learner = Learner(model, TrainerConfig(max_tokens_per_pack=2000), make_algorithm(config), total_updates=1)
        forward = learner.backend.forward

        def limited(batch, *args, limit=limit, model=model, forward=forward):
            if len(batch) > limit and when == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

            def full(grad):
                if len(batch) > limit:
                    assert model.lm_head.weight.grad is not None  # something has been added already
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

            handle = model.model.layers[0].register_forward_hook(
                lambda module, given, out: (out[0] if isinstance(out, tuple) else out).register_hook(full) and None
            )
            try:
                return forward(batch, *args)
            finally:
                handle.remove()

        learner.backend.forward = limited
        result = learner.accumulate(batches)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        packs.append(result.packs)
    assert learner.max_tokens == 500 and packs[1] > packs[0]
    assert (found[1] - found[0]).norm() <= 2e-6 * found[0].norm()


@pytest.mark.slow
def test_a_sequence_that_does_not_fit_is_an_error_with_a_cure(renderer):
    config = AlgorithmConfig(anchor={"mode": "blend"})
    groups = make_groups(renderer, config, prompts=1, rollouts=2)
    batches = [
        make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, groups)) for group in groups
    ]
    learner = Learner(tiny_model(renderer), TrainerConfig(), make_algorithm(config), total_updates=1)

    def full(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    learner.backend.forward = full
    with pytest.raises(PactError, match=r"single sequence of \d+ tokens: set model.gradient_checkpointing"):
        learner.accumulate(batches)


def test_an_update_that_is_not_finite_changes_nothing(renderer):
    """NaN in the weights of one token, and an infinite gradient behind a finite loss."""
    config = AlgorithmConfig(anchor={"mode": "blend"})
    groups = make_groups(renderer, config, prompts=2, rollouts=2)
    model = tiny_model(renderer)
    before = [p.detach().clone() for p in model.parameters()]
    learner = Learner(model, TrainerConfig(learning_rate=1e-2), make_algorithm(config), total_updates=4)
    batches = [
        make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, groups)) for group in groups
    ]
    batches[0].scored[0].rl_weight[0] = np.nan
    assert learner.update(batches).skipped
    batches = [
        make_algorithm(config).prompt_batch(group, step_context_of(renderer, config, groups)) for group in groups
    ]
    handle = model.lm_head.weight.register_hook(lambda grad: grad * torch.inf)
    assert learner.update(batches).skipped
    handle.remove()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not learner.backend.optimizer.state
    result = learner.update(batches)
    assert not result.skipped and np.isfinite(result.loss)
    assert not all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
