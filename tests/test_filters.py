"""Top-p, top-k and min-p: the filtered distribution, samples from it, and the trainer's comparison with it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from pact_fast.config.filters import UNFILTERED, SamplingFilters
from pact_fast.model import filters as filters_file
from pact_fast.model.filters import filtered, log_kept_mass
from pact_fast.rollout.embedded.engine import TransformersEngine, _Session
from pact_fast.rollout.engine import Request
from pact_fast.rollout.filter_bounds import log_kept_mass_bounds

FILTERS = [
    SamplingFilters(top_p=0.8),
    SamplingFilters(top_k=3),
    SamplingFilters(min_p=0.3),
    SamplingFilters(top_p=0.7, top_k=5),
    SamplingFilters(top_p=0.9, min_p=0.1),
    SamplingFilters(top_p=0.6, top_k=7, min_p=0.05),
    SamplingFilters(top_p=1e-6),
    SamplingFilters(min_p=1.0),
    SamplingFilters(top_k=10**6),
]


def oracle(logits: np.ndarray, filters: SamplingFilters) -> np.ndarray:
    """Probabilities [V] in fp64, token by token: min-p, then top-k, then top-p, each on the tokens left by the previous one.

    Ties at the limit of top-k are all kept; of those at the limit of top-p, the largest ids, as many as are needed.
    """
    p = np.exp(logits - logits.max())
    p /= p.sum()
    p[p < filters.min_p * p.max()] = 0
    if 0 < filters.top_k < len(p):
        p[p < sorted(p)[-filters.top_k]] = 0
    p /= p.sum()
    if filters.top_p < 1:
        ahead = 0.0
        for token in sorted(range(len(p)), key=lambda token: (-p[token], -token)):
            kept = ahead < filters.top_p
            ahead += p[token]
            p[token] *= kept
    return p / p.sum()


def tied_rows(rows: int = 40, vocabulary: int = 61) -> np.ndarray:
    """Logits of which most tie with others, at eighths so that fp32 holds them exactly, in an order that does not help."""
    rng = np.random.default_rng(0)
    return np.round(rng.normal(0, 2, (rows, vocabulary)) * rng.choice([1, 2, 8], (rows, 1))) / rng.choice(
        [1, 8], (rows, 1)
    )


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("candidates", [1, 8, 256])
def test_the_filtered_distribution_equals_the_oracle_with_ties(filters, candidates, monkeypatch):
    sort = filters_file._top_p
    monkeypatch.setattr(filters_file, "_top_p", lambda z, p, width=candidates: sort(z, p, width))  # 1: is widened twice
    logits = tied_rows()
    found = torch.softmax(filtered(torch.tensor(logits, dtype=torch.float32), filters).double(), -1).numpy()
    expected = np.stack([oracle(row, filters) for row in logits])
    assert ((found > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert (expected > 0).any(-1).all() and (filters.top_k > 100 or (expected == 0).any())


def test_rows_of_a_batch_do_not_change_each_other():
    logits = torch.tensor(tied_rows(), dtype=torch.float32)
    for filters in FILTERS:
        alone = torch.cat([filtered(row[None], filters) for row in logits])
        assert torch.equal(alone, filtered(logits, filters))


def test_the_kept_mass_counts_a_sampled_token_beyond_the_limit():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = torch.softmax(logits.double(), -1)[0]
    top_2 = SamplingFilters(top_k=2)
    assert log_kept_mass(logits, torch.tensor([1]), top_2).item() == pytest.approx(float((p[0] + p[1]).log()), abs=1e-6)
    beyond = log_kept_mass(logits, torch.tensor([3]), top_2)
    assert beyond.item() == pytest.approx(float((p[0] + p[1] + p[3]).log()), abs=1e-6)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_bounds_enclose_the_kept_mass_of_any_engine_that_rounds(filters):
    generator, slack = torch.Generator().manual_seed(0), 1e-3
    for logits in (torch.tensor(tied_rows()), torch.randn(40, 61, generator=generator).double()):
        p = logits.softmax(-1)
        for _ in range(5):
            rounded = logits + (slack / 4) * (2 * torch.rand(logits.shape, generator=generator) - 1)
            kept = filtered(rounded.float(), filters) > -torch.inf
            tokens = torch.multinomial(kept.double(), 1, generator=generator)[:, 0]
            low, high = log_kept_mass_bounds(logits, tokens, filters, slack)
            mass = (p * kept).sum(-1).log()
            assert (low - 1e-9 <= mass).all() and (mass <= high + 1e-9).all()
    # without ties near a limit they are the same, so the check that uses them sees a wrong filter
    low, high = log_kept_mass_bounds(logits, tokens, filters, 1e-9)
    torch.testing.assert_close(low, high)
    torch.testing.assert_close(low, log_kept_mass(logits.float(), tokens, filters).double(), rtol=0, atol=1e-6)


class Fixed(TransformersEngine):
    """The embedded engine with these logits [V] instead of a model's."""

    def __init__(self, logits: torch.Tensor):
        self.logits, self._eot_ids, self.version = logits, frozenset(), 0

    def draw(self, requests: list[Request]) -> tuple[list[int], list[float]]:
        sessions = []
        for request in requests:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(request.rng_key)))
            sessions.append(_Session(request.session, 0, generator))
            self._assign(sessions[-1], request)
        return self._sample(self.logits.expand(len(requests), -1).clone(), sessions)


@pytest.mark.parametrize("filters", FILTERS[:6], ids=str)
def test_samples_follow_the_filtered_distribution_and_log_probs_are_its(filters):
    """Chi-square over 4000 samples with fixed seeds, at a temperature, beside greedy and unfiltered sessions."""
    logits, temperature, n = tied_rows(1, 30)[0] / 4, 0.7, 4000
    expected = oracle(logits / temperature, filters)
    ids = np.arange(3)
    requests = [Request(s, ids, 1, (5, s), temperature, filters) for s in range(n)]
    requests += [Request(n, ids, 1, (6, 0), 0.0, filters), Request(n + 1, ids, 1, (6, 1), temperature)]
    engine = Fixed(torch.tensor(logits, dtype=torch.float32))
    tokens, logprobs = engine.draw(requests)
    alone, logprobs_alone = engine.draw(requests[:n])  # all sessions with the same filters
    assert alone == tokens[:n]
    np.testing.assert_allclose(logprobs_alone, logprobs[:n], atol=1e-6)
    counts = np.bincount(tokens[:n], minlength=len(expected))
    support = expected > 0
    assert counts[~support].sum() == 0 and 1 < support.sum() < len(expected)
    chi2 = ((counts - n * expected)[support] ** 2 / (n * expected[support])).sum()
    degrees = support.sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees)
    np.testing.assert_allclose(logprobs[:n], np.log(expected[tokens[:n]]), atol=1e-6)
    plain, at_one = oracle(logits / temperature, UNFILTERED), oracle(logits, UNFILTERED)
    assert tokens[n] == logits.argmax() and logprobs[n] == pytest.approx(np.log(at_one[tokens[n]]), abs=1e-6)
    assert logprobs[n + 1] == pytest.approx(np.log(plain[tokens[n + 1]]), abs=1e-6)


def test_a_filter_says_what_it_does():
    assert str(UNFILTERED) == "unfiltered" and not UNFILTERED
    everything = SamplingFilters(0.95, 20, 0.05)
    assert str(everything) == "top-p 0.95, top-k 20, min-p 0.05" and everything
    assert all(SamplingFilters(**{name: value}) for name, value in dataclasses.asdict(everything).items())
