"""The embedded engine: log-probs, scheduling, determinism."""

import gc

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast.rollout.embedded.engine import TransformersEngine
from pact_fast.rollout.embedded.inverse_cdf import BLOCK, inverse_cdf
from pact_fast.rollout.engine import Request

EOT = 2


def tiny_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
    ).eval()


def run(model, slots: int, sessions: int, temperature: float = 1.0):
    """Three turns per session with texts of random length between them; {session: [("text"|"turn", ids, logprobs)]}."""
    engine = TransformersEngine(model, [EOT], slots=slots)
    contexts: dict[int, list] = {}
    texts = {
        s: [np.random.default_rng((s % 3, t)).integers(3, 64, 1 + 17 * ((s + t) % 3)) for t in range(3)]
        for s in range(sessions)
    }
    for s in range(sessions):
        contexts[s] = [("text", texts[s][0], None)]
        engine.submit(Request(s, texts[s][0], 1 + s % 9, (7, s), temperature))
    live = set(range(sessions))
    while live:
        for done in engine.step():
            history = contexts[done.session]
            history.append(("turn", done.ids, done.logprobs))
            turn = sum(kind == "turn" for kind, *_ in history)
            if turn == 3:
                engine.close(done.session)
                live.discard(done.session)
            else:
                history.append(("text", texts[done.session][turn], None))
                engine.submit(Request(done.session, texts[done.session][turn], 12, temperature=temperature))
    return contexts


def test_sampler_logprobs_equal_a_plain_forward_over_the_whole_context():
    model = tiny_model()
    contexts = run(model, slots=4, sessions=9)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for history in contexts.values():
            ids = np.concatenate([part for _, part, _ in history])
            expected = torch.log_softmax(model(torch.as_tensor(ids)[None]).logits[0], -1)
            position = 0
            for kind, part, logprobs in history:
                if kind == "turn":
                    rows = torch.arange(position - 1, position - 1 + len(part))
                    np.testing.assert_allclose(logprobs, expected[rows, torch.as_tensor(part)].numpy(), atol=2e-6)
                position += len(part)


def test_a_session_that_goes_back_samples_from_what_it_keeps():
    """Another session runs on; texts that are kept to their beginning, into a turn, to its last token, and whole."""
    model, engine = tiny_model(), TransformersEngine(tiny_model(), [EOT], slots=2)
    numbers = np.random.default_rng(0)
    contexts: dict[int, np.ndarray] = {}

    def turn(session, ids, keep=None, key=()):
        kept = contexts.get(session, ids[:0])[:keep]
        engine.submit(Request(session, ids, 9, key, keep=keep))
        while not (done := engine.step()):
            pass
        contexts[session] = np.concatenate([kept, ids, done[0].ids])
        return done[0]

    turn(1, numbers.integers(3, 64, 30), key=(1,))
    turn(0, numbers.integers(3, 64, 40), key=(0,))
    for keep, size in ((7, 50), (20, 2), (-1, 1), (None, 3), (-4, 30)):
        last = contexts[0]
        done = turn(0, numbers.integers(3, 64, size), None if keep is None else keep % len(last))
        turn(1, numbers.integers(3, 64, 5))
        ids = contexts[0]
        assert len(ids) == (len(last) if keep is None else keep % len(last)) + size + len(done.ids)
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.as_tensor(ids)[None]).logits[0], -1)
        rows = torch.arange(len(ids) - len(done.ids) - 1, len(ids) - 1)
        np.testing.assert_allclose(done.logprobs, expected[rows, torch.as_tensor(done.ids)].numpy(), atol=2e-6)


def test_what_is_sampled_does_not_depend_on_what_else_runs():
    model = tiny_model()
    alone, crowded = run(model, slots=1, sessions=6), run(model, slots=6, sessions=6)
    for s in range(6):
        for (_, a, _), (_, b, _) in zip(alone[s], crowded[s], strict=True):
            np.testing.assert_array_equal(a, b)


def test_sampling_follows_the_model_distribution():
    model = tiny_model()
    engine = TransformersEngine(model, [EOT], slots=64)
    prompt = np.array([5, 6, 7])
    for s in range(4000):
        engine.submit(Request(s, prompt, 1, (3, s)))
    counts = np.zeros(64)
    while counts.sum() < 4000:
        for done in engine.step():
            counts[done.ids[0]] += 1
            engine.close(done.session)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        p = torch.softmax(model(torch.as_tensor(prompt)[None]).logits[0, -1], -1).double().numpy()
    chi2 = ((counts - 4000 * p) ** 2 / (4000 * p)).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)


def test_greedy_takes_the_most_likely_token():
    model = tiny_model()
    contexts = run(model, slots=3, sessions=3, temperature=0.0)
    model.set_attn_implementation("sdpa")
    first = contexts[0]
    with torch.no_grad():
        best = model(torch.as_tensor(first[0][1])[None]).logits[0, -1].argmax()
    assert first[1][1][0] == int(best)


def test_inverse_cdf_finds_the_token_of_the_whole_vocabularys_cdf():
    torch.manual_seed(0)
    for vocabulary in (3, BLOCK, BLOCK + 1, 5 * BLOCK - 7):
        logp = torch.log_softmax(3 * torch.randn(50, vocabulary), -1)
        uniform = torch.rand(50, dtype=torch.float64)
        cdf = logp.double().exp().cumsum(-1)
        expected = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
        assert torch.equal(inverse_cdf(logp, uniform), expected)


def test_inverse_cdf_returns_no_token_of_probability_0():
    vocabulary, last = 3 * BLOCK, torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0).double())
    for possible in ([0], [vocabulary - 1], [BLOCK - 1, BLOCK], [5, 2 * BLOCK]):
        logp = torch.full((2, vocabulary), -torch.inf)
        logp[:, possible] = -0.1
        first_and_last = inverse_cdf(logp, torch.stack([torch.zeros_like(last), last]))
        assert first_and_last.tolist() == [possible[0], possible[-1]]


@pytest.mark.slow
def test_the_cache_is_given_up_with_the_last_session_and_begins_anew():
    model, prompt = tiny_model(), np.arange(3, 40)
    engine = TransformersEngine(model, [EOT], slots=2)
    before, turns = cached_elements(), []
    for _ in range(2):
        for session in range(3):  # one waits for a slot
            engine.submit(Request(session, prompt, 5, (session,), 1.0))
        done = {}
        while len(done) < 3:
            for completion in engine.step():
                assert cached_elements() > before
                done[completion.session] = completion.ids.tolist()
                engine.close(completion.session)
        assert cached_elements() == before
        turns.append(done)
    assert turns[0] == turns[1]


def cached_elements() -> int:
    """Elements of all tensors that have the shape of a layer's keys or values."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum(tensor.numel() for tensor in tensors if tensor.ndim == 4 and tensor.shape[1:] == (2, 128, 8))
