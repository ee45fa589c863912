"""OpenRLHF's real Actor and losses: gradients with the adapter are those without."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast.errors import PactError
from pact_fast.integrations import fused_forward, host_loss
from pact_fast.integrations.openrlhf import install
from tests.support.broken_kernels import break_kernels
from tests.support.flash_attn_standin import openrlhf_models, ppo_trainer
from tests.support.small_chunks import make_small_chunks

host = openrlhf_models()
pytestmark = pytest.mark.slow  # OpenRLHF compiles its entropy
SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    make_small_chunks(monkeypatch)


def make_actor(*, packing=False, temperature=1.0, tied=False, lora=False) -> Any:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=tied))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    actor = host.Actor(model, temperature=temperature)
    actor.packing_samples = packing
    return actor


def batch():
    """Prompts padded on the left, completions on the right: [3, 12], of which 7 columns are actions."""
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(1, 300, (3, 12), generator=generator)
    attention, action = torch.ones(3, 12, dtype=torch.long), torch.ones(3, 7)
    attention[0, :3] = attention[1, 10:] = 0
    action[1, 5:] = action[2, 2] = 0  # the end, and an observation in the middle
    sequences = sequences * attention
    values = [torch.randn(3, 7, generator=generator) for _ in range(2)]
    return sequences, attention, action, *values


def policy_step(actor: Any, loss: Any) -> dict[str, torch.Tensor]:
    sequences, attention, action, noise, advantages = batch()
    logprob, output = actor(sequences, action, attention_mask=attention, return_output=True, return_entropy=True)
    old = (logprob + 0.3 * noise).detach()
    total = loss(logprob, old, advantages, action_mask=action)[0]
    entropy = host.aggregate_loss(output.entropy[:, -action.shape[1] :], action)
    (total - 0.01 * entropy).backward()
    return gradients(actor) | {"log-probs": logprob.detach(), "entropy": entropy.detach()}


def gradients(actor: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    actor.zero_grad()
    return found


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * max(1e-3, expected.abs().max()), name


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"temperature": 0.7}, {"tied": True}, {"lora": True}])
@pytest.mark.parametrize("loss", [{}, {"policy_loss_type": "gspo"}, {"dual_clip": 2.0}])
def test_policy_steps_have_the_gradients_of_openrlhfs_own_code(options, loss):
    if options.get("lora") and loss:
        pytest.skip("the loss is independent of adapters")
    actor = make_actor(**options)
    theirs = policy_step(actor, host.PolicyLoss(**loss))
    remove = install()
    try:
        compare(policy_step(actor, host.PolicyLoss(**loss)), theirs)
        compare(policy_step(actor, host.PolicyLoss(**loss)), theirs)  # after the check of the first step
    finally:
        remove()
    compare(policy_step(actor, host.PolicyLoss(**loss)), theirs)
    assert "forward" not in vars(actor.model)


def test_sft_steps_have_the_gradients_of_openrlhfs_own_code():
    actor = make_actor()
    sequences, attention, *_ = batch()

    def step() -> dict[str, torch.Tensor]:
        logprob = actor(sequences, attention_mask=attention, return_logprobs=True)
        host.SFTLoss()(logprob, attention[:, 1:].float()).backward()
        return gradients(actor)

    theirs = step()
    remove = install()
    try:
        compare(step(), theirs)
    finally:
        remove()


def test_calls_for_logits_and_generation_are_the_hosts_own():
    actor = make_actor()
    sequences, attention, action, *_ = batch()
    remove = install()
    try:
        policy_step(actor, host.PolicyLoss())
        logits = actor(sequences, attention_mask=attention, return_output=True).logits
        assert logits.shape == (3, 12, 300)
        generated = actor.model.generate(sequences[2:], max_new_tokens=3, do_sample=False)
        assert generated.shape[1] <= 15
        with torch.no_grad():  # the reference model's log-probs
            reference = actor(sequences, action, attention_mask=attention)
    finally:
        remove()
    with torch.no_grad():
        assert torch.allclose(reference, actor(sequences, action, attention_mask=attention), atol=1e-5)


def test_only_tokens_of_actions_are_scored(monkeypatch):
    rows = []
    own = fused_forward.linear_logprob
    monkeypatch.setattr(
        fused_forward, "linear_logprob", lambda hidden, *a, **k: rows.append(len(hidden)) or own(hidden, *a, **k)
    )
    actor = make_actor()
    remove = install()
    try:
        policy_step(actor, host.PolicyLoss())
    finally:
        remove()
    assert rows[-1] == int(batch()[2].sum())


def make_trainer(actor: Any, loss: Any, **settings: Any) -> Any:
    """OpenRLHF's trainer of a policy, with its real `training_step`, without DeepSpeed, Ray and optimizer."""
    kl = SimpleNamespace(use_loss=False, init_coef=0.1, estimator="k3", unbiased_gradient=False)
    vars(kl).update({name: value for name, value in settings.items() if hasattr(kl, name)})
    args = SimpleNamespace(
        actor=SimpleNamespace(entropy_coef=settings.get("entropy_coef"), aux_loss_coef=0.0),
        algo=SimpleNamespace(kl=kl), train=SimpleNamespace(dynamic_batch_enable=False),
    )  # fmt: skip
    trainer = ppo_trainer().__new__(ppo_trainer())
    scale = settings.get("scale", 1.0)  # as DeepSpeed's accumulation and loss scaling do
    trainer.strategy = SimpleNamespace(
        args=args, ring_attn_group=None, backward=lambda loss, *_: (loss * scale).backward(),
        optimizer_step=lambda *_, **__: None, get_grad_norm=lambda _: 0.0,
    )  # fmt: skip
    trainer.args, trainer.actor, trainer.actor_loss_fn, trainer.aux_loss = args, actor, loss, False
    trainer.replay_buffer = trainer.ema_model = trainer.actor_optim = None
    trainer.actor_scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    return trainer


def training_step(trainer: Any) -> dict[str, torch.Tensor]:
    from openrlhf.trainer.ppo_utils.experience import Experience

    sequences, attention, action, noise, advantages = batch()
    near = -5.7 + 0.3 * noise  # about log 1/300
    experience = Experience(
        sequences=sequences, attention_mask=attention, action_mask=action, action_log_probs=near * action,
        base_action_log_probs=(near + 0.2) * action, rollout_log_probs=(near - 0.1) * action, advantages=advantages,
        info={},
    )  # fmt: skip
    status = trainer.training_step(experience, 0.1, 0)
    metrics = {n: v.detach() for n, v in status["metrics"].items() if isinstance(v, torch.Tensor) and v.dim() == 0}
    return gradients(trainer.actor) | metrics


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ({}, {}),
        ({"dual_clip": 2.0, "token_level_loss": False}, {"scale": 0.25}),
        ({"is_correction_level": "token"}, {"use_loss": True, "entropy_coef": 0.01}),
        ({"policy_loss_type": "gspo"}, {"use_loss": True}),
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_training_steps_have_the_gradients_and_metrics_of_openrlhfs_own_code(loss, settings, packing):
    actor = make_actor(packing=packing, temperature=0.8)
    trainer = make_trainer(actor, host.PolicyLoss(**loss), **settings)
    theirs = training_step(trainer)
    remove = install()
    try:
        compare(training_step(trainer), theirs)
        compare(training_step(trainer), theirs)
    finally:
        remove()
    compare(training_step(trainer), theirs)


@pytest.mark.parametrize(("kind", "passes"), [("ppo", 1), ("gspo", 2)])
def test_a_loss_that_is_a_sum_over_tokens_needs_one_pass(kind, passes, monkeypatch):
    calls = []
    for module, name in ((host_loss, "pact_loss"), (fused_forward, "linear_logprob")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, own=own, **k: calls.append(own) or own(*a, **k))
    trainer = make_trainer(make_actor(), host.PolicyLoss(policy_loss_type=kind))
    remove = install()
    try:
        training_step(trainer)
    finally:
        remove()
    assert len(calls) == passes


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("step", ["policy loss", "training step"])
def test_a_broken_kernel_is_an_error_in_the_first_step(where, step, monkeypatch):
    break_kernels(monkeypatch, where)
    trainer = make_trainer(make_actor(), host.PolicyLoss())
    remove = install()
    try:
        with pytest.raises(PactError, match=r"OpenRLHF: (log-probs|gradients)"):
            training_step(trainer) if step == "training step" else policy_step(trainer.actor, host.PolicyLoss())
    finally:
        remove()
