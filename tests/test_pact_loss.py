"""pact_loss against the formulas token by token: full logits, fp64, Python loops, gradients from autograd."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from pact_fast.components import Component
from pact_fast.errors import PactError
from pact_fast.kernels import LossContext, LossTokens, PolicyLoss, PolicyTerm, pact_loss, policy_loss, summarise
from pact_fast.kernels.head import chunked
from tests.support.memory import peak_bytes

VOCAB, WIDTH = 1003, 12
NAN = float("nan")


def model(rows: int = 30, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    shapes = (rows, WIDTH), (VOCAB, WIDTH), (VOCAB,)
    return [torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def table(hidden: torch.Tensor, weight: torch.Tensor, n: int = 60, seed: int = 1) -> LossTokens:
    """Random tokens of all contexts with every special case: shared rows, NaN columns, zero weights and advantages.

    Old, reference and sampler log-probs are near the current ones, so that a part of the ratios is clipped.
    """
    torch.manual_seed(seed)
    row = torch.randint(len(hidden), (n,))
    target = torch.randint(VOCAB, (n,))
    with torch.no_grad():
        now = (hidden[row] @ weight.T).double().log_softmax(-1).gather(1, target[:, None])[:, 0].float()
    context = torch.randint(3, (n,))
    policy = context != LossContext.EXPERT
    tokens = LossTokens(
        row=row,
        target=target,
        context=context,
        component=torch.randint(5, (n,)),
        sequence=torch.randint(6, (n,)),
        advantage=torch.randn(n),
        old_logprob=now + 0.4 * torch.randn(n),
        rl_weight=torch.rand(n) * policy,
        sft_weight=torch.rand(n) * ~policy,
        ref_logprob=now + 0.5 * torch.randn(n),
        sampler_logprob=now + 0.5 * torch.randn(n),
    )
    for column, value in ((tokens.old_logprob, NAN), (tokens.sampler_logprob, NAN), (tokens.ref_logprob, NAN)):
        column[torch.rand(n) < 0.2] = value
    for column in (tokens.rl_weight, tokens.sft_weight, tokens.advantage):
        column[torch.rand(n) < 0.15] = 0.0
    masked = torch.where(tokens.rl_weight == 0)[0][:2]
    tokens.old_logprob[masked] = -5000.0  # a ratio that overflows, on a masked token
    return tokens


def oracle(
    hidden, weight, t, *, bias=None, policy_loss="ppo", clip=(0.2, 0.2), delta=None, kl_coef=0.0, entropy_coef=0.0,
    importance_cap=None, temperature=1.0, softcap=None,
):  # fmt: skip
    """(loss, logprob [N], entropy [N], {(statistic, context, component): sum}) straight from the formulas.

    Besides the built-in rules it knows the two of OWN_RULES.
    """
    policy_loss = policy_loss.rpartition(":")[2]
    low, high = (math.inf if c is None else c for c in clip)
    logprobs, entropies = [], []
    for i in range(len(t)):
        z = weight @ hidden[t.row[i]]
        z = z if bias is None else z + bias
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        z = z / (temperature[i].double() if isinstance(temperature, torch.Tensor) else temperature)
        log_p = z - z.logsumexp(0)
        logprobs.append(log_p[t.target[i]])
        entropies.append(-(log_p.exp() * log_p).sum())
    old = [lp.detach() if math.isnan(o) else o.double() for lp, o in zip(logprobs, t.old_logprob, strict=True)]
    sequences = defaultdict(list)
    for i in range(len(t)):
        if t.rl_weight[i] != 0:
            sequences[int(t.sequence[i]), int(t.context[i])].append((logprobs[i] - old[i]).detach())
    loss, sums = hidden.sum() * 0 + weight.sum() * 0 + (0 if bias is None else bias.sum() * 0), defaultdict(float)
    for i, (lp, h) in enumerate(zip(logprobs, entropies, strict=True)):
        cell = int(t.context[i]), int(t.component[i])

        def count(name, value=1.0, cell=cell):
            sums[name, *cell] += value.item() if isinstance(value, torch.Tensor) else value

        a, rl, sft = float(t.advantage[i]), float(t.rl_weight[i]), float(t.sft_weight[i])
        count("count"), count("logprob", lp), count("prob", lp.exp()), count("entropy", h)
        if sft:
            loss = loss - sft * lp
            count("sft_count"), count("loss_sft", -sft * lp)
        if not rl:
            continue
        token_ratio = (lp - old[i]).exp()
        ratio = token_ratio
        if policy_loss in ("gspo", "SequenceWeighted"):
            values = sequences[int(t.sequence[i]), int(t.context[i])]
            ratio = (sum(values) / len(values)).exp() * (lp - lp.detach()).exp()
        bounded = ratio.clamp(1 - low, 1 + high)
        if policy_loss == "cispo":
            term = -bounded.detach() * a * lp
            below, above = ratio < 1 - low and a != 0, ratio > 1 + high and a != 0
        elif policy_loss in ("test_reinforce", "Reinforce"):
            term, below, above = -a * lp, False, False
        elif policy_loss == "SequenceWeighted":
            below, above = False, delta is not None and ratio > delta and a != 0
            term = -(ratio if delta is None else ratio.clamp(max=delta)).detach() * a * lp
        else:
            unclipped = ratio if delta is None else ratio.clamp(max=delta)
            term = -torch.minimum(unclipped * a, bounded * a)
            below = ratio < 1 - low and a < 0
            above = (ratio > 1 + high and a > 0) or (delta is not None and ratio > delta and a < 0)
        w = 1.0
        sampler = float(t.sampler_logprob[i])
        cap = importance_cap.get(LossContext(int(t.context[i]))) if isinstance(importance_cap, dict) else importance_cap
        if cap is not None and not math.isnan(sampler):
            w = min(cap, math.exp(float(old[i]) - sampler))
        kl = 0.0
        if not math.isnan(t.ref_logprob[i]):
            d = t.ref_logprob[i].double() - lp
            kl = d.exp() - d - 1
            count("ref_count"), count("kl", kl)
        if not math.isnan(sampler):
            gap = float(old[i]) - sampler
            count("sampler_count"), count("is_weight", w), count("is_weight_sq", w * w)
            count("logprob_diff", gap), count("logprob_diff_sq", gap * gap)
        part = rl * (w * term + kl_coef * kl - entropy_coef * h)
        loss = loss + part
        count("rl_count"), count("loss_rl", part), count("ratio", ratio)
        count("approx_kl", token_ratio - 1 - token_ratio.log())
        count("clipped_low", below), count("clipped_high", above), count("clipped", below or above)
    stack = lambda values: torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)  # noqa: E731
    return loss, stack(logprobs), stack(entropies), sums


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def close(a, b, tolerance=1e-10):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return bool((a - b).norm() <= tolerance * b.norm())


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 6.0, "temperature": 1.3},
    "weights": {"importance_cap": 1.1},
    "weights by context": {"importance_cap": {LossContext.PROMPT: 1.5, LossContext.TRACE: 0.8}},
    "weights in one context": {"importance_cap": {LossContext.TRACE: 1.0}},
    "kl": {"kl_coef": 0.3},
    "entropy": {"entropy_coef": 0.2},
    "asymmetric": {"clip": (0.1, 0.4)},
    "open": {"clip": (None, 0.1)},
    "unbounded": {"clip": (None, None)},
    "all": {"importance_cap": 0.9, "kl_coef": 0.1, "entropy_coef": 0.05, "softcap": 8.0, "temperature": 0.9},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("policy_loss", ["ppo", "cispo", "gspo"])
def test_loss_gradients_and_statistics_are_those_of_the_formulas(policy_loss, options):
    check(policy_loss, **options)


@pytest.mark.parametrize("policy_loss", ["ppo", "gspo"])
def test_dual_clip(policy_loss):
    check(policy_loss, delta=1.25)


def test_bias_and_temperature_per_token():
    check("ppo", with_bias=True, temperature=torch.rand(60) + 0.5, softcap=7.0, entropy_coef=0.1)


OWN_RULES = """
from pact_fast.kernels import PolicyLoss, PolicyTerm

class Reinforce(PolicyLoss):
    def term(self, log_ratio, advantage, logprob, clip, delta):
        return PolicyTerm(-advantage * logprob, -advantage)

class SequenceWeighted(PolicyLoss):
    sequence_ratio = True
    takes_delta = True

    def term(self, log_ratio, advantage, logprob, clip, delta):
        ratio = log_ratio.exp()
        slope = -(ratio if delta is None else ratio.clamp(max=delta)) * advantage
        above = None if delta is None else ratio > delta
        return PolicyTerm(slope * logprob, slope, clipped_high=above)

class NoRule:
    pass
"""


@policy_loss("test_reinforce")
class Registered(PolicyLoss):
    def term(self, log_ratio, advantage, logprob, clip, delta):
        return PolicyTerm(-advantage * logprob, -advantage)


@pytest.fixture
def own(tmp_path):
    (tmp_path / "rules.py").write_text(OWN_RULES)
    return f"{tmp_path / 'rules.py'}:"


OWN_OPTIONS = [{}, {"importance_cap": 0.9, "kl_coef": 0.1, "entropy_coef": 0.05, "softcap": 8.0, "temperature": 0.9}]


@pytest.mark.parametrize("options", OWN_OPTIONS)
def test_rules_of_a_file_outside_the_package(options, own):
    check(own + "Reinforce", **options)
    check(own + "SequenceWeighted", **options)
    check(own + "SequenceWeighted", delta=1.25, **options)


@pytest.mark.parametrize("options", OWN_OPTIONS)
def test_a_rule_registered_by_its_decorator(options):
    check("test_reinforce", **options)


@pytest.mark.slow
def test_own_rules_work_in_compiled_graphs(own):
    hidden, weight, _ = model(dtype=torch.float32)
    tokens = table(hidden, weight)

    def run(hidden, name):
        return pact_loss(hidden * 2.0, weight, tokens, policy_loss=name).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for name in ("test_reinforce", own + "SequenceWeighted"):
        a, b = (gradients(f(hidden, name), [hidden, weight]) for f in (run, compiled))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(PactError, match="unknown policy loss 'dapo'"):
        compiled(hidden, "dapo")


def test_rules_that_cannot_be_used_are_one_line_errors(own):
    hidden, weight, _ = model()
    tokens = table(hidden, weight)
    for name, options, message in (
        (own + "NoRule", {}, "derive the class from pact_fast.kernels.PolicyLoss"),
        (own + "Reinforced", {}, "did you mean 'Reinforce'"),
        (own + "Reinforce", {"delta": 3.0}, "takes no delta"),
    ):
        with pytest.raises(PactError, match=message) as error:
            pact_loss(hidden, weight, tokens, policy_loss=name, **options)
        assert "\n" not in str(error.value)


def check(policy_loss, with_bias=False, **options):
    hidden, weight, bias = model()
    tokens = table(hidden, weight)
    inputs = [hidden, weight]
    if with_bias:
        options["bias"] = bias
        inputs.append(bias)
    out = pact_loss(hidden, weight, tokens, policy_loss=policy_loss, **options)
    loss, logprob, entropy, sums = oracle(hidden, weight, tokens, policy_loss=policy_loss, **options)
    assert close(out.loss, loss) and close(out.logprob, logprob) and close(out.entropy, entropy)
    for mine, theirs in zip(gradients(out.loss, inputs), gradients(loss, inputs), strict=True):
        assert close(mine, theirs)
    assert {name for name, *_ in sums} <= set(out.stats)
    for name, values in out.stats.items():
        expected = torch.tensor([[sums[name, s, c] for c in Component] for s in range(3)], dtype=torch.float64)
        assert torch.allclose(values, expected, rtol=1e-10, atol=1e-12), name


def test_the_table_reaches_every_branch():
    hidden, weight, _ = model()
    tokens = table(hidden, weight)
    sums = {name: float(v.sum()) for name, v in pact_loss(hidden, weight, tokens).stats.items()}
    assert len(tokens.row.unique()) < len(tokens)
    assert min(sums["clipped_low"], sums["clipped_high"], sums["sft_count"]) >= 2
    assert sums["clipped"] < sums["rl_count"] < sums["count"]
    live = tokens.select(tokens.rl_weight != 0)
    for column in (live.old_logprob, live.ref_logprob, live.sampler_logprob):
        assert 0 < column.isnan().sum() < len(live)
    assert (live.advantage == 0).any()


def test_an_unknown_old_logprob_makes_the_ratio_exactly_one():
    hidden, weight, _ = model(dtype=torch.float32)
    tokens = table(hidden, weight)
    tokens.old_logprob.fill_(NAN)
    stats = pact_loss(hidden, weight, tokens).stats
    assert torch.equal(stats["ratio"], stats["rl_count"])
    assert not stats["approx_kl"].any() and not stats["clipped"].any()


@pytest.mark.parametrize("policy_loss", ["ppo", "cispo", "gspo"])
def test_masked_tokens_contribute_exactly_nothing(policy_loss):
    hidden, weight, _ = model(dtype=torch.float32)
    tokens = table(hidden, weight)
    tokens.rl_weight.zero_()
    tokens.sft_weight.zero_()
    tokens.old_logprob.fill_(-5000.0)
    tokens.ref_logprob.fill_(5000.0)
    tokens.sampler_logprob.fill_(-9000.0)
    out = pact_loss(
        hidden,
        weight,
        tokens,
        policy_loss=policy_loss,
        kl_coef=1.0,
        entropy_coef=1.0,
        importance_cap=2.0,
        clip=(None, None),
    )
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert not hidden.grad.any() and not weight.grad.any()
    assert all(v.isfinite().all() for v in out.stats.values())


@pytest.mark.parametrize("policy_loss", ["ppo", "cispo", "gspo"])
def test_an_advantage_of_zero_silences_an_overflowing_ratio(policy_loss):
    hidden, weight, _ = model(dtype=torch.float32)
    tokens = table(hidden, weight)
    tokens.advantage.zero_()
    tokens.sft_weight.zero_()
    tokens.old_logprob.fill_(-500.0)
    out = pact_loss(hidden, weight, tokens, policy_loss=policy_loss, clip=(None, None))
    out.loss.backward()
    assert out.loss.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("policy_loss", ["ppo", "cispo", "gspo"])
def test_no_token_and_one_token(n, policy_loss):
    hidden, weight, _ = model()
    tokens = table(hidden, weight, 60).select(torch.arange(3, 3 + n))
    tokens.rl_weight.fill_(0.5)
    tokens.advantage.fill_(-1.5)
    out = pact_loss(hidden, weight, tokens, policy_loss=policy_loss, entropy_coef=0.1)
    loss, *_ = oracle(hidden, weight, tokens, policy_loss=policy_loss, entropy_coef=0.1)
    assert out.logprob.shape == (n,) and float(out.stats["count"].sum()) == n
    assert close(out.loss, loss)
    for mine, theirs in zip(gradients(out.loss, [hidden, weight]), gradients(loss, [hidden, weight]), strict=True):
        assert close(mine, theirs)


@pytest.mark.parametrize("policy_loss", ["ppo", "gspo"])
@pytest.mark.parametrize("rows", [1, 7])
def test_chunk_size_changes_nothing(rows, policy_loss, monkeypatch):
    hidden, weight, _ = model()
    tokens = table(hidden, weight)

    def run():
        out = pact_loss(hidden, weight, tokens, policy_loss=policy_loss, entropy_coef=0.1, kl_coef=0.1)
        return [out.loss, out.logprob, out.entropy, *gradients(out.loss, [hidden, weight]), *out.stats.values()]

    whole = run()
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", rows * 2 * 8 * VOCAB)
    assert all(close(a, b) for a, b in zip(run(), whole, strict=True))


@pytest.mark.parametrize("policy_loss", ["ppo", "cispo", "gspo"])
def test_micro_batches_add_up(policy_loss):
    hidden, weight, _ = model()
    tokens = table(hidden, weight)
    options = {"policy_loss": policy_loss, "importance_cap": 1.0, "kl_coef": 0.1, "entropy_coef": 0.1}
    whole = pact_loss(hidden, weight, tokens, **options)
    # gspo's unit is the sequence; the others may be cut anywhere
    unit = tokens.sequence if policy_loss == "gspo" else torch.randint(3, (len(tokens),))
    parts = [pact_loss(hidden, weight, tokens.select(unit % 3 == k), **options) for k in range(3)]
    assert close(sum(p.loss for p in parts), whole.loss)
    for k, total in enumerate(gradients(whole.loss, [hidden, weight])):
        assert close(sum(gradients(p.loss, [hidden, weight])[k] for p in parts), total)
    for name, total in whole.stats.items():
        assert close(sum(p.stats[name] for p in parts), total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    hidden, weight, _ = model(rows=400, dtype=dtype)
    tokens = table(hidden, weight, 400)
    tokens.row = torch.arange(400)
    coefficient = tokens.rl_weight * tokens.advantage + tokens.sft_weight
    tokens.old_logprob.fill_(NAN)

    def plain(h, w):
        logits = h[tokens.row] @ w.T
        logits = logits if h.dtype == torch.float64 else logits.float()
        logprob = logits.log_softmax(-1).gather(1, tokens.target[:, None])[:, 0]
        return logprob, -(coefficient * logprob).sum()

    def errors(logprob, loss, exact):
        found = [logprob, *gradients(loss, [hidden, weight])]
        return [(a.double() - b).norm() for a, b in zip(found, exact, strict=True)]

    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logprob, loss = plain(h, w)
    exact = [logprob, *gradients(loss, [h, w])]
    out = pact_loss(hidden, weight, tokens)
    mine, theirs = errors(out.logprob, out.loss, exact), errors(*plain(hidden, weight), exact)
    assert all(a <= 2 * b for a, b in zip(mine, theirs, strict=True)), (mine, theirs)


def test_types():
    hidden, weight, _ = model(dtype=torch.bfloat16)
    out = pact_loss(hidden, weight, table(hidden, weight))
    out.loss.backward()
    assert out.loss.dtype == out.logprob.dtype == out.entropy.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert all(v.dtype == torch.float64 and v.shape == (3, len(Component)) for v in out.stats.values())


def test_a_second_backward_gives_the_same_gradient_and_upstream_scales_it():
    hidden, weight, _ = model()
    out = pact_loss(hidden, weight, table(hidden, weight))
    (3.0 * out.loss).backward(retain_graph=True)
    first = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    out.loss.backward(retain_graph=True)
    assert close(3.0 * hidden.grad, first[0]) and close(3.0 * weight.grad, first[1])
    out.loss.backward()  # accumulates
    assert close(1.5 * hidden.grad, first[0]) and close(1.5 * weight.grad, first[1])


def test_second_derivatives_are_an_error():
    hidden, weight, _ = model()
    out = pact_loss(hidden, weight, table(hidden, weight))
    with pytest.raises(PactError, match="second derivatives"):
        torch.autograd.grad(out.loss, hidden, create_graph=True)


def test_no_gradient_work_when_nothing_wants_a_gradient(monkeypatch):
    hidden, weight, _ = model()
    tokens = table(hidden, weight)
    expected = pact_loss(hidden, weight, tokens).loss.detach()
    monkeypatch.setattr(chunked.ChunkedHead, "backward", lambda *_: pytest.fail("gradient work"))
    with torch.no_grad():
        assert torch.equal(pact_loss(hidden, weight, tokens).loss, expected)
    out = pact_loss(hidden.detach(), weight.detach(), tokens)
    assert torch.equal(out.loss, expected) and not out.loss.requires_grad


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one_input_only(wanted):
    inputs = model()[:2]
    tokens = table(*inputs)
    expected = gradients(pact_loss(*inputs, tokens).loss, inputs)[wanted]
    inputs[1 - wanted] = inputs[1 - wanted].detach()
    assert close(gradients(pact_loss(*inputs, tokens).loss, inputs[wanted])[0], expected)


@pytest.mark.parametrize("backend, dtype", [("torch", torch.float64), ("auto", torch.float32)])
def test_tokens_without_a_coefficient_cost_no_backward_gemm(backend, dtype, monkeypatch):
    hidden, weight, _ = model(dtype=dtype)
    tokens = table(hidden, weight)
    active = (gradient_coefficient(hidden.double(), weight.double(), tokens) != 0).sum()
    assert 0 < active < len(tokens)
    rows = []
    make = chunked.make_gemms

    def watched(*arguments):
        gemms = make(*arguments)
        backward = gemms.backward
        gemms.backward = lambda dz, *rest: rows.append(len(dz)) or backward(dz, *rest)
        return gemms

    monkeypatch.setattr(chunked, "make_gemms", watched)
    pact_loss(hidden, weight, tokens, backend=backend)
    assert rows == [active]


def gradient_coefficient(hidden, weight, tokens) -> torch.Tensor:
    """A measure [N] of every token's gradient, by autograd with a hidden row of its own: 0 where it has none."""
    alone = LossTokens(**{**vars(tokens), "row": torch.arange(len(tokens))})
    rows = hidden.detach()[tokens.row].requires_grad_()
    return gradients(oracle(rows, weight.detach(), alone)[0], [rows])[0].abs().sum(1)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_logits_of_all_tokens_never_exist(backend, monkeypatch):
    n, vocab, budget = 2048, 20_000, 32 << 20
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", budget)
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    tokens = table(*model()[:2], n=n)
    tokens.row = torch.arange(n)

    def run():
        pact_loss(hidden, weight, tokens, entropy_coef=0.1, backend=backend).loss.backward()

    assert peak_bytes(run) < 2 * budget < 4 * n * vocab


@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_autocast_multiplies_in_its_dtype_and_lowers_nothing_else(types):
    hidden, weight, _ = model(dtype=torch.float32)
    hidden = hidden.detach().to(types[0]).requires_grad_()
    tokens = table(hidden.float(), weight)
    rounded = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    cast = pact_loss(*rounded, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        inside = pact_loss(hidden, weight, tokens)
    assert torch.equal(cast.loss, inside.loss) and torch.equal(cast.logprob, inside.logprob)
    given = gradients(inside.loss, [hidden, weight])
    assert [g.dtype for g in given] == list(types)
    for a, b in zip(gradients(cast.loss, rounded), given, strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=2**-7, atol=1e-3)


def test_runs_are_bit_identical():
    hidden, weight, _ = model(dtype=torch.float32)
    tokens = table(hidden, weight)
    runs = [gradients(pact_loss(hidden, weight, tokens).loss, [hidden, weight]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy_loss": "dapo"}, "unknown policy loss 'dapo'; registered: cispo, gspo, gspo_sequence, ppo"),
        ({"delta": 1.1}, "delta=1.1"),
        ({"delta": 3.0, "policy_loss": "cispo"}, "delta"),
        ({"kl_coef": 0.1}, "ref_logprob"),
        ({"importance_cap": 1.0}, "sampler_logprob"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"bias": torch.ones(3)}, "bias"),
        ({"backend": "triton"}, "triton"),
    ],
)
def test_settings_that_cannot_work_are_one_line_errors(options, message):
    hidden, weight, _ = model()
    tokens = table(hidden, weight)
    tokens.ref_logprob = tokens.sampler_logprob = None
    with pytest.raises(PactError, match=message) as error:
        pact_loss(hidden, weight, tokens, **options)
    assert "\n" not in str(error.value)


def test_summary_names_means_and_skips_empty_cells():
    hidden, weight, _ = model()
    tokens = table(hidden, weight).select(torch.arange(4))
    tokens.context[:] = torch.tensor([LossContext.PROMPT, LossContext.TRACE, LossContext.TRACE, LossContext.EXPERT])
    tokens.component[:] = torch.tensor(
        [Component.ANSWER, Component.TOOL_CALL, Component.REASONING, Component.TOOL_CALL]
    )  # fmt: skip
    tokens.rl_weight[:] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    tokens.sft_weight[:] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    tokens.old_logprob.fill_(-7.0)
    tokens.sampler_logprob[:] = torch.tensor([NAN, -7.0, -7.0 - math.log(3.0), NAN])
    out = pact_loss(hidden, weight, tokens, importance_cap=2.0)
    values = summarise(out.stats)
    assert values["trace/tokens"] == 2 and values["trace/tool_call/tokens"] == 1
    assert values["trace/entropy"] == pytest.approx(float(out.entropy[1:3].mean()))
    assert values["trace/tool_call/entropy"] == pytest.approx(float(out.entropy[1]))
    assert values["trace/logprob_diff"] == pytest.approx(math.log(3.0) / 2)
    assert values["trace/logprob_diff_std"] == pytest.approx(math.log(3.0) / 2)
    assert values["trace/ess"] == pytest.approx((1 + 2) ** 2 / (1 + 4))
    assert values["trace/ess_fraction"] == pytest.approx(0.9)
    assert values["trace/is_weight"] == pytest.approx(1.5)
    assert values["expert/loss_sft"] == pytest.approx(-float(out.logprob[3]))
    assert "expert/clip_fraction" not in values and "expert/loss_rl" not in values
    assert "prompt/logprob_diff" not in values and "prompt/reasoning/tokens" not in values
    assert 0.0 <= values["prompt/clip_fraction"] <= 1.0
