"""prime-rl's heads, in a stand-in with their interface: results and gradients with the adapter are those without."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.integrations import prime_rl
from tests.support import prime_rl_standin as standin
from tests.support.broken_kernels import break_kernels


@pytest.fixture(autouse=True)
def installed_standin(monkeypatch):
    standin.put_in_place(monkeypatch)


def rl_step(head: torch.nn.Module, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 97, (2, 9), generator=generator)
    temperature = torch.rand(2, 9, generator=generator) + 0.5
    output = head(hidden, labels, temperature=temperature, **options)
    (output["logprobs"] * torch.randn(2, 9, generator=generator)).sum().backward()
    found = [output["logprobs"].detach(), output["entropy"].detach(), hidden.grad, head.weight.grad.clone()]
    head.zero_grad()
    return found


def sft_step(head: torch.nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 97, (2, 9), generator=generator)
    labels[:, :4] = -100
    loss = head(hidden, labels)["loss"]
    loss.backward()
    found = [loss.detach(), hidden.grad, head.weight.grad.clone()]
    head.zero_grad()
    return found


HEADS = {
    "rl": (lambda: standin.FusedOutputLinear(16, 97, 8), rl_step),
    "rl with soft-cap": (lambda: standin.GemmaFusedOutputLinear(16, 97, 8, 5.0), rl_step),
    "sft": (lambda: standin.FusedCrossEntropyOutputLinear(16, 97), sft_step),
    "sft with soft-cap": (lambda: standin.FusedCrossEntropyOutputLinear(16, 97, 5.0), sft_step),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_prime_rls_results_and_gradients(name):
    torch.manual_seed(0)
    make, step = HEADS[name]
    head = make()
    with torch.no_grad():
        head.weight.mul_(10)
    theirs = step(head)
    remove = prime_rl.install()
    try:
        steps = [step(head), step(head)]
    finally:
        remove()
    for ours in [*steps, step(head)]:
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_what_the_kernels_do_not_serve_is_prime_rls_own():
    head = standin.FusedOutputLinear(16, 97, 8)
    remove = prime_rl.install()
    try:
        hidden, labels, temperature = torch.randn(1, 3, 16), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3)
        masked = head(hidden, labels, temperature=temperature, sampling_mask=torch.ones(1))
        assert not masked["logprobs"].any()
        with pytest.raises(AssertionError):
            head(hidden)
        assert "logits" in standin.FusedCrossEntropyOutputLinear(16, 97)(hidden)
    finally:
        remove()


def test_without_its_heads_the_adapter_says_so(monkeypatch):
    for name in ("lm_head", "lm_head_gemma"):
        module = ModuleType(f"{standin.PACKAGE}.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(PactError, match="no supported head class"):
        prime_rl.install()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_broken_kernel_is_an_error_on_the_first_batch(name, where, monkeypatch):
    make, step = HEADS[name]
    break_kernels(monkeypatch, where)
    remove = prime_rl.install()
    try:
        with pytest.raises(PactError, match=r"prime-rl: (log-probs|gradients)"):
            step(make())
    finally:
        remove()
