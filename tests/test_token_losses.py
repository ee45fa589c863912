"""Functions as losses of pact_loss, weights of KL and entropy, both gradients of a sequence's ratio, row statistics."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.kernels import LossTokens, linear_logprob, pact_loss, token_losses
from pact_fast.kernels.head.objective import CallableLoss
from pact_fast.kernels.head.row_statistics import STATISTICS

N, T, D, V = 60, 30, 8, 37


def problem(dtype=torch.float64, seed=0):
    """hidden [T, D], weight [V, D], and a table of N policy tokens in 6 sequences near the current log-probs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(T, D).to(dtype).requires_grad_(), normal(V, D).to(dtype).requires_grad_()
    row, target = torch.arange(N) % T, torch.randint(V, (N,), generator=generator)
    with torch.no_grad():
        now = (hidden[row].double() @ weight.T.double()).log_softmax(-1).gather(1, target[:, None])[:, 0]
    tokens = LossTokens(
        row, target, sequence=torch.arange(N) // 10, advantage=normal(N), old_logprob=now + 0.4 * normal(N),
        rl_weight=normal(N).abs() + 0.1, ref_logprob=now + 0.5 * normal(N),
    )  # fmt: skip
    return hidden, weight, tokens


def full(hidden, weight, tokens):
    """(logprob, entropy) [N] by full logits."""
    log_p = (hidden @ weight.T).log_softmax(-1)[tokens.row]
    return log_p.gather(1, tokens.target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def same(given, expected, inputs, rtol=1e-10):
    torch.testing.assert_close(given, expected, rtol=rtol, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(z, inputs) for z in (given, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.3, "entropy_coef": 0.1}], ids=["plain", "kl and entropy"])
def test_a_function_equals_the_built_in_rule_to_the_last_bit(options, backend):
    hidden, weight, tokens = problem(torch.float32)
    function = token_losses.ppo(tokens.advantage, tokens.old_logprob)
    results = []
    for rule in ("ppo", function):
        out = pact_loss(hidden, weight, tokens, policy_loss=rule, backend=backend, **options)
        results.append((out.loss, out.logprob, out.entropy, *torch.autograd.grad(out.loss, (hidden, weight))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def bonus(scale):
    return lambda logprob, entropy, index: scale[index] * (entropy - 2.0).square() - logprob.exp()


LOSSES = {
    "sapo": lambda t: token_losses.sapo(t.advantage, t.old_logprob),
    "dppo tv": lambda t: token_losses.dppo(t.advantage, t.old_logprob, low=0.01, high=0.01),
    "dppo kl": lambda t: token_losses.dppo(t.advantage, t.old_logprob, "kl", low=1e-3, high=1e-3),
    "k1": lambda t: token_losses.kl(t.ref_logprob, "k1"),
    "k2": lambda t: token_losses.kl(t.ref_logprob, "k2"),
    "clamped k3": lambda t: token_losses.kl(t.ref_logprob, bound=0.1),
    "ratio-weighted kl": lambda t: token_losses.ratio_weighted(token_losses.kl(t.ref_logprob), t.old_logprob),
    "sum": lambda t: token_losses.weighted_sum(
        (1.0, token_losses.sapo(t.advantage, t.old_logprob)), (t.advantage.abs(), token_losses.kl(t.ref_logprob))
    ),
    "entropy": lambda t: bonus(t.advantage),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_of_functions_are_those_of_full_logits(name, monkeypatch):
    from pact_fast.kernels.head import chunked

    monkeypatch.setattr(chunked, "max_chunk_rows", lambda *_: 14)  # several chunks
    hidden, weight, tokens = problem()
    function = LOSSES[name](tokens)
    out = pact_loss(hidden, weight, tokens, policy_loss=function)
    expected = (tokens.rl_weight * function(*full(hidden, weight, tokens), torch.arange(N))).sum()
    same(out.loss, expected, (hidden, weight))


def phi(logprob):
    """p·(1 − p)·(−log p), the first factor a constant."""
    p = logprob.exp()
    return (p * (1 - p)).detach() * -logprob


def ratio_to_one_shaped(logprob, gamma=0.1):
    return -logprob.exp() / (logprob.exp() + gamma)


SFT_LOSSES = {
    "phi": (token_losses.phi_weighted, phi),
    "shaped": (token_losses.shaped(), ratio_to_one_shaped),
    "shaped, 0.5": (token_losses.shaped(0.5), lambda logprob: ratio_to_one_shaped(logprob, 0.5)),
    "constant": (torch.ones_like, lambda logprob: torch.ones_like(logprob)),
}


@pytest.mark.parametrize("rule", ["ppo", "gspo_sequence", "function"])
@pytest.mark.parametrize("name", SFT_LOSSES)
def test_expert_tokens_may_have_a_loss_of_their_own_beside_policy_tokens(name, rule, monkeypatch):
    from pact_fast.kernels.head import chunked

    monkeypatch.setattr(chunked, "max_chunk_rows", lambda *_: 14)  # several chunks
    hidden, weight, tokens = problem()
    expert = torch.arange(N) % 3 == 0
    tokens.sft_weight = torch.where(expert, torch.linspace(-1, 2, N, dtype=torch.float64), 0.0)
    tokens.rl_weight = torch.where(torch.arange(N) % 6 == 3, 0.0, tokens.rl_weight)  # half of them are in both losses
    policy = token_losses.sapo(tokens.advantage, tokens.old_logprob) if rule == "function" else rule
    given, formula = SFT_LOSSES[name]
    out = pact_loss(hidden, weight, tokens, policy_loss=policy, sft_loss=given)
    alone = dataclasses.replace(tokens, sft_weight=0.0)
    expected = pact_loss(hidden, weight, alone, policy_loss=policy).loss
    expected = expected + (tokens.sft_weight * formula(full(hidden, weight, tokens)[0])).sum()
    same(out.loss, expected, (hidden, weight))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_the_negative_log_likelihood_as_a_function_is_the_default_to_the_last_bit(backend):
    hidden, weight, tokens = problem(torch.float32)
    tokens.sft_weight = torch.rand(N, generator=torch.Generator().manual_seed(1))
    results = []
    for sft in (None, torch.neg):
        out = pact_loss(hidden, weight, tokens, sft_loss=sft, backend=backend)
        results.append((out.loss, *torch.autograd.grad(out.loss, (hidden, weight)), out.stats["loss_sft"]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(PactError, match=r"sft_loss: the function returned \[\]; it must return one loss per token"):
        pact_loss(hidden, weight, tokens, sft_loss=torch.sum)


def test_dppo_masks_what_has_moved_too_far_in_the_direction_of_its_advantage():
    p, q = torch.tensor([0.35, 0.10, 0.90, 0.20, 0.1]), torch.tensor([0.10, 0.40, 0.50, 0.70, 0.6])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss = token_losses.dppo(advantage, q.log(), low=0.2, high=0.28)
    logprob = p.log().requires_grad_()
    (slope,) = torch.autograd.grad(loss(logprob, logprob, torch.arange(5)).sum(), logprob)
    torch.testing.assert_close(slope, torch.tensor([-3.5, 0.0, 0.0, 0.0, -1 / 6]))


def test_a_function_may_say_nothing_and_must_return_one_loss_per_token():
    hidden, weight, tokens = problem()
    constant = pact_loss(hidden, weight, tokens, policy_loss=lambda logprob, entropy, index: torch.ones_like(logprob))
    assert not any(g.any() for g in torch.autograd.grad(constant.loss, (hidden, weight)))
    torch.testing.assert_close(constant.loss, tokens.rl_weight.sum())
    with pytest.raises(PactError, match=r"returned \[\]; it must return one loss per token"):
        pact_loss(hidden, weight, tokens, policy_loss=lambda logprob, entropy, index: logprob.sum())


def test_kl_and_entropy_have_weights_of_their_own():
    hidden, weight, tokens = problem()
    tokens.rl_weight[:20], tokens.kl_weight = 0.0, torch.rand(N, dtype=torch.float64)
    tokens.entropy_weight = torch.rand(N, dtype=torch.float64)
    tokens.kl_weight[10:30] = tokens.entropy_weight[5:25] = 0.0
    out = pact_loss(hidden, weight, tokens, kl_coef=0.3, entropy_coef=0.2)
    logprob, entropy = full(hidden, weight, tokens)
    terms = token_losses.ppo(tokens.advantage, tokens.old_logprob)(logprob, entropy, torch.arange(N))
    k3 = token_losses.kl(tokens.ref_logprob)(logprob, entropy, torch.arange(N))
    expected = (tokens.rl_weight * terms + 0.3 * tokens.kl_weight * k3 - 0.2 * tokens.entropy_weight * entropy).sum()
    same(out.loss, expected, (hidden, weight))


@pytest.mark.parametrize("form", ["gspo", "gspo_sequence"])
def test_both_gradients_of_a_sequences_ratio(form):
    hidden, weight, tokens = problem()
    tokens.rl_weight[::7] = 0.0
    out = pact_loss(hidden, weight, tokens, policy_loss=form, kl_coef=0.1)
    logprob, _ = full(hidden, weight, tokens)
    loss = 0.1 * (tokens.rl_weight * token_losses.kl(tokens.ref_logprob)(logprob, logprob, torch.arange(N))).sum()
    for i in range(6):
        mine = (tokens.sequence == i) & (tokens.rl_weight != 0)
        mean = (logprob[mine] - tokens.old_logprob[mine]).mean()
        ratio = (
            mean.exp()
            if form == "gspo_sequence"
            else mean.exp().detach() * (logprob[mine] - logprob[mine].detach()).exp()
        )
        a = tokens.advantage[mine]
        loss = loss - (tokens.rl_weight[mine] * torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)).sum()
    same(out.loss, loss, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_row_statistics_are_those_of_the_final_logits(dtype):
    hidden, weight, tokens = problem(dtype)
    with torch.no_grad():
        weight[5] = weight[6] = 3.0 * weight[7]  # ties
        z = (hidden[tokens.row].double() @ weight.T.double()) / 0.7
    expected = {
        "is_top1": z.argmax(-1) == tokens.target, "mean_logit": z.mean(-1), "min_logit": z.amin(-1),
        "max_logit": z.amax(-1), "log_sum_sq_probs": z.softmax(-1).square().sum(-1).log(),
    }  # fmt: skip
    out = pact_loss(hidden, weight, tokens, temperature=0.7, statistics=tuple(STATISTICS))
    result = linear_logprob(hidden[tokens.row], weight, tokens.target, temperature=0.7, statistics=tuple(STATISTICS))
    logprob, entropy = result
    assert entropy is None and logprob.requires_grad and not result.statistics["mean_logit"].requires_grad
    for name, value in expected.items():
        for given in (out.row_statistics[name], result.statistics[name]):
            if name == "is_top1":
                assert torch.equal(given, value) and value.any()
            else:
                torch.testing.assert_close(given.double(), value, rtol=1e-5, atol=1e-5)
    with pytest.raises(PactError, match="statistics='top1' is unknown; use is_top1"):
        linear_logprob(hidden, weight, tokens.target[:T], statistics=["top1"])


@pytest.mark.timing
def test_a_function_takes_less_than_a_twentieth_of_the_pass(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(768, 256, generator=generator) / 16).requires_grad_()
    weight = torch.randn(8192, 256, generator=generator).requires_grad_()
    target = torch.arange(768)
    tokens = LossTokens(
        target, target, advantage=torch.randn(768, generator=generator), rl_weight=1.0, old_logprob=-9.0
    )
    inner, outer, evaluate = [], [], CallableLoss.evaluate

    def timed(*arguments):
        begin = time.process_time()
        term = evaluate(*arguments)
        inner.append(time.process_time() - begin)
        return term

    monkeypatch.setattr(CallableLoss, "evaluate", timed)
    function = token_losses.ppo(tokens.advantage, tokens.old_logprob)
    for _ in range(5):
        done, begin = len(inner), time.process_time()
        pact_loss(hidden, weight, tokens, policy_loss=function).loss.backward()
        outer.append(sum(inner[done:]) / (time.process_time() - begin))
    assert sorted(outer)[2] < 0.05, outer
