"""Pairs of tokens against the definition: full distributions in fp64, gradients from autograd."""

from __future__ import annotations

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.kernels import TokenPairs, pact_loss, summarise
from pact_fast.kernels.head import chunked
from tests.support.loss_inputs import VOCAB, inputs, tokens

INDEX = torch.tensor([[0, 7], [12, 3], [5, 19], [1, 2], [9, 8]])
WEIGHT = torch.tensor([0.7, 0.0, 1.3, 0.2, 0.4])


def softmaxes(hidden, weight, bias, table, temperature, softcap):
    z = hidden[table.row] @ weight.T
    if bias is not None:
        z = z + bias
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    return z.log_softmax(-1)


def definition(log_p, index, kind, second_grad):
    """[M] divergences; without second_grad, nothing flows into the second token."""
    first, second = log_p[index[:, 0]], log_p[index[:, 1]]
    if not second_grad:
        second = second.detach()
    p, q = first.exp(), second.exp()
    if kind == "reverse_kl":
        return (p * (first - second)).sum(-1)
    if kind == "forward_kl":
        return (q * (second - first)).sum(-1)
    middle = ((p + q) / 2).log()
    return ((p * (first - middle)).sum(-1) + (q * (second - middle)).sum(-1)) / 2


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("second_grad", [False, True])
@pytest.mark.parametrize("softcap, per_token, rows", [(None, False, 2), (4.0, True, 6), (None, True, 1000)])
@pytest.mark.parametrize("dtype, backend, bound", [(torch.float64, "torch", 1e-10), (torch.float32, "auto", 2e-6)])
def test_values_and_gradients(kind, second_grad, softcap, per_token, rows, dtype, backend, bound, monkeypatch):
    # pairs in several chunks, in all but the last chunk, in one chunk
    monkeypatch.setattr(chunked, "max_chunk_rows", lambda *_: rows)
    arguments, table = inputs(dtype), tokens()
    hidden, weight, bias = arguments
    temperature = torch.rand(len(table), dtype=torch.float64) + 0.5 if per_token else 0.8
    pairs = TokenPairs(INDEX, WEIGHT, kind, second_grad)
    options = {"temperature": temperature, "softcap": softcap, "bias": bias, "backend": backend}
    with_pairs = pact_loss(hidden, weight, table, pairs=pairs, **options)
    without = pact_loss(hidden, weight, table, **options)
    given = torch.autograd.grad(with_pairs.loss - without.loss, arguments)

    exact = [t.detach().double().requires_grad_() for t in arguments]
    expected = definition(softmaxes(*exact, table, temperature, softcap), INDEX, kind, second_grad)
    loss = (WEIGHT.double() * expected).sum()
    assert torch.allclose(with_pairs.divergence.double(), expected, rtol=0, atol=10 * bound)
    assert abs(float((with_pairs.loss - without.loss).detach()) - float(loss)) < 50 * bound
    for a, b in zip(given, torch.autograd.grad(loss, exact), strict=True):
        assert (a.double() - b).norm() <= 30 * bound * max(1.0, b.norm())
    for a, b in ((with_pairs.logprob, without.logprob), (with_pairs.entropy, without.entropy)):
        torch.testing.assert_close(a, b)  # the order of tokens is the caller's again


def test_a_weight_of_zero_only_measures():
    hidden, weight, _ = inputs(torch.float64)
    table = tokens()
    plain = pact_loss(hidden, weight, table)
    measured = pact_loss(hidden, weight, table, pairs=TokenPairs(INDEX, torch.zeros(5)))
    assert torch.equal(plain.loss, measured.loss) and measured.divergence.sum() > 1.0
    for a, b in zip(*(torch.autograd.grad(o.loss, (hidden, weight)) for o in (plain, measured)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_rows_with_one_distribution_have_no_divergence():
    hidden, weight, _ = inputs()
    table = tokens()
    table.row[:2] = 4
    out = pact_loss(hidden, weight, table, pairs=TokenPairs(torch.tensor([[0, 1]]), torch.ones(1)))
    assert abs(out.divergence.item()) < 1e-6


def test_statistics_are_those_of_the_first_tokens_cell():
    hidden, weight, _ = inputs(torch.float64)
    table = tokens()
    out = pact_loss(hidden, weight, table, pairs=TokenPairs(INDEX[:1], torch.ones(1)))
    assert summarise(out.stats)["prompt/divergence"] == pytest.approx(float(out.divergence[0]))
    assert "trace/divergence" not in summarise(out.stats)


@pytest.mark.parametrize(
    "pairs, message",
    [
        (TokenPairs(INDEX, WEIGHT, "renyi"), "renyi"),
        (TokenPairs(INDEX, WEIGHT[:-1]), r"\[5, 2\] and weight \[4\]"),
        (TokenPairs(torch.tensor([[0, VOCAB]]), WEIGHT[:1]), "outside the table of 20"),
        (TokenPairs(torch.tensor([[0, 1], [1, 2]]), WEIGHT[:2]), "two pairs"),
    ],
)
def test_pairs_that_do_not_fit_are_one_line_errors(pairs, message):
    hidden, weight, _ = inputs()
    with pytest.raises(PactError, match=message):
        pact_loss(hidden, weight, tokens(), pairs=pairs)
