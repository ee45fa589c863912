"""The sampling kernel against fp64, and its limits."""

from __future__ import annotations

import pytest
import torch

from pact_fast.kernels.decoder import sampling
from pact_fast.kernels.runtime import build

pytestmark = pytest.mark.skipif(build.status() != "ready", reason="no C++ kernels here")
BLOCK = 256  # tokens, of csrc/sample.cpp


def draw(logits, temperature=1.0, uniform=None):
    n = len(logits)
    uniform = torch.rand(n, dtype=torch.float64) if uniform is None else torch.tensor(uniform, dtype=torch.float64)
    temperatures = torch.full((n,), float(temperature))
    tokens, logprobs = sampling.sample(logits, temperatures, uniform)
    return tokens, logprobs, uniform


@pytest.mark.parametrize("vocabulary", [1, 3, 255, BLOCK, BLOCK + 1, 5 * BLOCK - 7, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 7.0])
def test_tokens_and_log_probs_are_those_of_fp64(vocabulary, temperature):
    torch.manual_seed(vocabulary)
    logits = 5 * torch.randn(300 if vocabulary < 9999 else 20, vocabulary)
    tokens, logprobs, uniform = draw(logits, temperature)
    exact = torch.log_softmax(logits.double() / temperature, -1)
    assert torch.allclose(logprobs.double(), exact.gather(1, tokens[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    cdf = exact.exp().cumsum(-1)
    before = torch.nn.functional.pad(cdf, (1, 0)).gather(1, tokens[:, None])[:, 0]
    after = cdf.gather(1, tokens[:, None])[:, 0]
    assert bool(((before - 1e-6 <= uniform) & (uniform <= after + 1e-6)).all())
    expected = torch.searchsorted(cdf, uniform[:, None], right=True)[:, 0]
    assert (tokens != expected).float().mean() < 0.02  # at most where the variate stands on a boundary


def test_greedy_takes_the_first_of_the_most_probable():
    logits = torch.randn(4, 1000)
    logits[0, [17, 900]] = logits[1, 999] = logits[2, 0] = 50.0
    tokens, logprobs, _ = draw(logits, 0.0)
    assert tokens.tolist() == [17, 999, 0, int(logits[3].argmax())]
    assert torch.allclose(logprobs, torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0], atol=2e-6)


@pytest.mark.parametrize("possible", [[0], [3 * BLOCK - 1], [BLOCK - 1, BLOCK], [5, 2 * BLOCK], [BLOCK, BLOCK + 255]])
def test_no_token_of_probability_0_is_drawn(possible):
    logits = torch.full((3, 3 * BLOCK), -torch.inf)
    logits[:, possible] = -0.1
    logits[:, 100] = -200.0  # its exp is 0 in fp32
    largest = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0).double()).item()
    tokens, _, _ = draw(logits, uniform=[0.0, largest, 0.5])
    assert tokens[:2].tolist() == [possible[0], possible[-1]]
    assert tokens[2] in possible


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_a_token_of_the_vocabulary_and_nan(bad):
    logits = torch.randn(3, 700)
    logits[1, 300] = bad
    for temperature in (0.0, 1.0):
        tokens, logprobs, _ = draw(logits, temperature)
        assert bool(((tokens >= 0) & (tokens < 700)).all())
        assert logprobs.isnan().tolist() == [False, True, False]
    tokens, logprobs, _ = draw(torch.full((1, 300), -torch.inf))
    assert 0 <= int(tokens) < 300 and bool(logprobs.isnan())


def test_rows_do_not_depend_on_the_batch_or_the_threads():
    torch.manual_seed(0)
    logits = torch.randn(9, 3000)
    tokens, logprobs, uniform = draw(logits)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = draw(logits, uniform=uniform.tolist())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(tokens, again[0]) and torch.equal(logprobs, again[1])
    for i in range(9):
        one = draw(logits[i : i + 1], uniform=uniform[i : i + 1].tolist())
        assert one[0] == tokens[i] and one[1] == logprobs[i]


def test_tensors_of_other_shapes_are_refused():
    logits, ok = torch.randn(2, 8), (torch.ones(2), torch.rand(2, dtype=torch.float64))
    for temperatures, uniforms in ((torch.ones(3), ok[1]), (ok[0], torch.rand(2)), (ok[0].double(), ok[1])):
        with pytest.raises(RuntimeError, match="pact_fast: "):
            sampling.sample(logits, temperatures, uniforms)
    with pytest.raises(RuntimeError, match="logits"):
        sampling.sample(torch.randn(2, 0), *ok)
    assert not sampling.serves(logits.bfloat16()) and not sampling.serves(logits[0])
