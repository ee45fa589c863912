"""Losses that are functions of all log-probs, differentiated in the pass over the logits where they are sums over tokens."""

from __future__ import annotations

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.integrations import host_loss
from pact_fast.integrations.host_loss import HostLoss
from pact_fast.kernels import Head
from tests.support.small_chunks import make_small_chunks

T, D, V, N = 40, 16, 97, 30


def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    row, target = torch.arange(5, 5 + N), torch.randint(0, V, (N,), generator=generator)
    noise, advantage = torch.randn(2, N, generator=generator, dtype=torch.float64)
    z = hidden.detach()[row] @ weight.detach().T
    old = z.log_softmax(1).gather(1, target[:, None])[:, 0] + 0.3 * noise
    return hidden, weight, row, target, old, advantage


def losses(old: torch.Tensor, advantage: torch.Tensor) -> dict:
    weight = torch.linspace(0.5, 1.5, N).double()

    def clipped(logprob, entropy):
        ratio = (logprob - old).exp()
        return -(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * weight).mean()

    def sequence(logprob, entropy):  # one ratio for all tokens
        return -((logprob - old).mean().exp() * advantage).mean()

    return {
        "clipped": clipped,
        "with entropy": lambda logprob, entropy: clipped(logprob, entropy) - 0.1 * (entropy * weight).mean(),
        "nothing": lambda logprob, entropy: 0.0 * logprob.sum(),
        "sequence": sequence,
        "normalised": lambda logprob, entropy: (logprob - logprob.detach().mean()).square().sum(),
    }


def oracle(loss, hidden, weight, row, target) -> list[torch.Tensor]:
    z = hidden[row] @ weight.T / 0.7
    logs = z.log_softmax(1)
    total = loss(logs.gather(1, target[:, None])[:, 0], -(logs.exp() * logs).sum(1))
    return [total.detach(), *torch.autograd.grad(total, (hidden, weight))]


@pytest.fixture
def small_chunks(monkeypatch):
    make_small_chunks(monkeypatch, 8)


@pytest.mark.parametrize("name", ["clipped", "with entropy", "nothing", "sequence", "normalised"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_are_those_of_full_logits(name, scale, small_chunks):
    hidden, weight, row, target, old, advantage = problem()
    loss, form = losses(old, advantage)[name], HostLoss()
    expected = oracle(loss, hidden, weight, row, target)
    logprob, entropy = form(hidden, Head(weight), row, target, loss, old, 0.7)
    total = loss(logprob, entropy)
    (total * scale).backward()
    assert form.token_wise == (name not in ("sequence", "normalised"))
    for ours, theirs in zip([total, hidden.grad / scale, weight.grad / scale], expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1e-3, theirs.abs().max())


def test_only_other_losses_take_a_second_pass(monkeypatch, small_chunks):
    hidden, weight, row, target, old, advantage = problem()
    passes = []
    for name in ("pact_loss", "separate_logprobs"):
        own = getattr(host_loss, name)
        monkeypatch.setattr(host_loss, name, lambda *a, own=own, name=name, **k: passes.append(name) or own(*a, **k))
    known, form = losses(old, advantage), HostLoss()
    for name in ("clipped", "sequence", "sequence"):
        form(hidden, Head(weight), row, target, known[name], old)
    assert passes == ["pact_loss", "pact_loss", "separate_logprobs", "separate_logprobs"]


def test_tokens_of_one_chunk_need_no_second_pass():
    hidden, weight, row, target, old, advantage = problem()
    form = HostLoss()
    form(hidden, Head(weight), row, target, losses(old, advantage)["sequence"], old)
    assert form.token_wise


def test_another_gradient_than_that_of_the_loss_is_an_error(small_chunks):
    hidden, weight, row, target, old, advantage = problem()
    logprob, _ = HostLoss()(hidden, Head(weight), row, target, losses(old, advantage)["clipped"], old)
    with pytest.raises(PactError, match="not the one whose gradients were formed"):
        logprob.sum().backward()


def test_no_token_is_no_gradient():
    hidden, weight, *_ = problem()
    nothing = torch.zeros(0, dtype=torch.int64)
    form, start = HostLoss(), torch.zeros(0, dtype=torch.float64)
    logprob, entropy = form(hidden, Head(weight), nothing, nothing, lambda x, y: x.sum(), start)
    (logprob.sum() + entropy.sum()).backward()
    assert not hidden.grad.any() and not weight.grad.any()
