"""`logit_scale` of the kernels: values and gradients are those of scaled logits, with and without a soft-cap."""

from __future__ import annotations

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.kernels import LossTokens, linear_logprob, pact_loss

ROWS, WIDTH, VOCAB = 37, 64, 1003
SCALES = [0.3, 13.0]
BACKENDS = [("torch", torch.float64, 1e-10), ("torch", torch.float32, 1e-5), ("cpp", torch.float32, 1e-5)]


def example(dtype):
    torch.manual_seed(0)
    shapes = [(ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,)]
    inputs = [torch.randn(s, dtype=torch.float64).mul_(0.3).to(dtype).requires_grad_() for s in shapes]
    return inputs, torch.randint(VOCAB, (ROWS,)), torch.rand(ROWS, dtype=torch.float64) + 0.5


def oracle(inputs, scale, softcap, temperature):
    """Log-probs [N, V] in fp64, in the order of Cohere's and Granite's code: scale, then soft-cap, then temperature."""
    hidden, weight, bias = (t.double() for t in inputs)
    z = scale * (hidden @ weight.T + bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature[:, None], -1)


def close(a, b, tolerance):
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


@pytest.mark.parametrize("backend, dtype, tolerance", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", SCALES)
def test_log_probs_entropies_and_gradients(scale, softcap, backend, dtype, tolerance):
    inputs, targets, temperature = example(dtype)
    given = linear_logprob(
        inputs[0], inputs[1], targets, bias=inputs[2], temperature=temperature, softcap=softcap, logit_scale=scale,
        entropy=True, backend=backend,
    )  # fmt: skip
    logp = oracle(inputs, scale, softcap, temperature)
    expected = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    for a, b in zip(given, expected, strict=True):
        assert close(a, b, tolerance)
    ours = torch.autograd.grad((given.logprob * given.entropy).sum(), inputs)
    theirs = torch.autograd.grad((expected[0] * expected[1]).sum(), inputs)
    assert all(close(a, b, 10 * tolerance) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend, dtype, tolerance", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("policy_loss", ["ppo", "gspo"])
def test_the_loss_and_its_gradients(policy_loss, softcap, backend, dtype, tolerance):
    inputs, targets, temperature = example(dtype)
    ints, floats = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS, dtype=torch.float64)
    tokens = LossTokens(
        torch.arange(ROWS), targets, ints, ints, ints, -floats, torch.nan * floats, 0.25 * floats, 0.5 * floats
    )
    given = pact_loss(
        inputs[0], inputs[1], tokens, bias=inputs[2], temperature=temperature, softcap=softcap, logit_scale=0.3,
        policy_loss=policy_loss, backend=backend,
    )  # fmt: skip
    logprob = oracle(inputs, 0.3, softcap, temperature).gather(1, targets[:, None])[:, 0]
    expected = (0.25 * (logprob - logprob.detach()).exp() - 0.5 * logprob).sum()
    assert close(given.loss, expected, tolerance)
    ours, theirs = (torch.autograd.grad(loss, inputs) for loss in (given.loss, expected))
    assert all(close(a, b, 10 * tolerance) for a, b in zip(ours, theirs, strict=True))


def test_bf16_errors_are_those_of_a_scale_of_1():
    inputs, targets, temperature = example(torch.bfloat16)

    def error(scale):
        given = linear_logprob(*inputs[:2], targets, bias=inputs[2], temperature=temperature, logit_scale=scale)
        expected = oracle(inputs, scale, None, temperature).gather(1, targets[:, None])[:, 0]
        return float((given.logprob.double() - expected).norm().detach())

    assert error(0.3) <= 2 * error(1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_factor_is_refused(scale):
    inputs, targets, _ = example(torch.float32)
    with pytest.raises(PactError, match="logit_scale"):
        linear_logprob(*inputs[:2], targets, logit_scale=scale)
