"""OpenRLHF's real Actor and losses: gradients with the adapter are those without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.integrations import fused_forward, host_loss
from pact_fast.integrations.openrlhf import install
from tests.support.broken_kernels import break_kernels
from tests.support.openrlhf_actors import batch, gradients, host, make_actor, make_trainer, training_step
from tests.support.processes import run_ranks
from tests.support.small_chunks import make_small_chunks

pytestmark = pytest.mark.slow  # OpenRLHF imports its training libraries


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """OpenRLHF compiles its entropy, which takes longer than all steps here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    make_small_chunks(monkeypatch)


def policy_step(actor: Any, loss: Any) -> dict[str, torch.Tensor]:
    sequences, attention, action, noise, advantages = batch()
    logprob, output = actor(sequences, action, attention_mask=attention, return_output=True, return_entropy=True)
    old = (logprob + 0.3 * noise).detach()
    total = loss(logprob, old, advantages, action_mask=action)[0]
    entropy = host.aggregate_loss(output.entropy[:, -action.shape[1] :], action)
    (total - 0.01 * entropy).backward()
    return gradients(actor) | {"log-probs": logprob.detach(), "entropy": entropy.detach()}


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


def test_steps_of_two_ranks_under_zero_have_the_gradients_of_openrlhfs_own_code():
    from tests.support import openrlhf_ranks

    run_ranks(openrlhf_ranks.training_steps, 2, 3)
