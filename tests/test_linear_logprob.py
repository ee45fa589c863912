"""linear_logprob against full logits in fp64, gradcheck, precision in small types, and memory."""

from __future__ import annotations

import re

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.kernels import backends, linear_logprob
from pact_fast.kernels.head import chunked
from tests.support.memory import peak_bytes

VOCAB = 1003


def example(rows: int = 37, width: int = 8, vocab: int = VOCAB, dtype: torch.dtype = torch.float64, scale: float = 1.0):
    """hidden, weight, bias (all wanting gradients) and targets."""
    torch.manual_seed(0)
    hidden = (scale * torch.randn(rows, width, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(vocab, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(vocab, (rows,))


def full(hidden, weight, bias, targets, temperature=1.0, softcap=None):
    """The definition, with all logits at once."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, None]
    probability = torch.distributions.Categorical(logits=(z / temperature).to(max(z.dtype, torch.float32, key=bits)))
    return probability.log_prob(targets), probability.entropy()


def bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-10 * b.norm())


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_full_logits(softcap, per_row, with_bias):
    hidden, weight, bias, targets = example()
    temperature = torch.rand(len(targets), dtype=torch.float64) + 0.5 if per_row else 0.7
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    used = bias if with_bias else None
    mine = linear_logprob(
        hidden, weight, targets, bias=used, temperature=temperature, softcap=softcap, entropy=True
    )  # fmt: skip
    theirs = full(hidden, weight, used, targets, temperature, softcap)
    mix = torch.randn(2, len(targets), dtype=torch.float64)
    for a, b in zip(mine, theirs, strict=True):
        assert close(a, b)
    for k in ((0,), (1,), (0, 1)):  # through the log-prob only, the entropy only, both
        a = torch.autograd.grad(sum((mine[i] * mix[i]).sum() for i in k), inputs, retain_graph=True)
        b = torch.autograd.grad(sum((theirs[i] * mix[i]).sum() for i in k), inputs, retain_graph=True)
        assert all(close(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, weight, bias, targets = example(rows=4, width=3, vocab=5)
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)

    def run(*inputs):
        h, w, b = inputs
        return linear_logprob(h, w, targets, bias=b, temperature=temperature, softcap=softcap, entropy=True)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_gradients_only_where_wanted():
    hidden, weight, bias, targets = example()
    result = linear_logprob(hidden.detach(), weight, targets, bias=bias.detach())
    result.logprob.sum().backward()
    assert hidden.grad is None and bias.grad is None
    expected = torch.autograd.grad(full(hidden, weight, bias, targets)[0].sum(), weight)[0]
    assert close(weight.grad, expected)
    assert result.entropy is None
    assert not linear_logprob(hidden.detach(), weight.detach(), targets).logprob.requires_grad


@pytest.mark.parametrize("rows", [2, 6, 36])
def test_chunk_size_changes_nothing(rows, monkeypatch):
    hidden, weight, bias, targets = example()

    def run():
        value, entropy = linear_logprob(hidden, weight, targets, bias=bias, entropy=True)
        return [value, entropy, *torch.autograd.grad((value * entropy).sum(), (hidden, weight, bias))]

    whole = run()
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", rows * 5 * 8 * VOCAB)
    assert chunked.max_chunk_rows(VOCAB, 5 * 8 * VOCAB, hidden.device) == rows
    assert all(close(a, b) for a, b in zip(run(), whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    hidden, weight, _, targets = example(rows=300, width=32, vocab=2003, dtype=dtype)
    mix = torch.randn(len(targets))

    def errors(run, exact):
        value = run(hidden, weight)
        gradients = torch.autograd.grad((value * mix).sum(), (hidden, weight))
        return [(a.double() - b).norm() for a, b in zip((value, *gradients), exact, strict=True)]

    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    value = full(h, w, None, targets)[0]
    exact = [value, *torch.autograd.grad((value * mix).sum(), (h, w))]
    plain = errors(lambda h, w: full(h, w, None, targets)[0], exact)
    mine = errors(lambda h, w: linear_logprob(h, w, targets).logprob, exact)
    assert all(a <= 2 * b for a, b in zip(mine, plain, strict=True)), (mine, plain)


def test_types_of_results_and_gradients():
    hidden, weight, _, targets = example(dtype=torch.bfloat16)
    logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True)
    assert logprob.dtype == entropy.dtype == torch.float32
    logprob.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_autocast_multiplies_in_its_dtype_and_lowers_nothing_else(types):
    hidden, weight, _, targets = example(dtype=torch.float32)
    hidden = hidden.detach().to(types[0]).requires_grad_()

    def run(hidden, weight):
        logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True)
        return [logprob, entropy, *torch.autograd.grad((logprob * entropy).sum(), (hidden, weight))]

    cast = run(hidden.bfloat16().detach().requires_grad_(), weight.bfloat16().detach().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(hidden, weight)
    assert [t.dtype for t in inside] == [torch.float32, torch.float32, *types]
    assert all(torch.equal(a, b) for a, b in zip(cast[:2], inside[:2], strict=True))
    for a, b in zip(cast[2:], inside[2:], strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=2**-7, atol=2e-2)
    alone = run(hidden.float().detach().requires_grad_(), weight)
    assert not torch.equal(alone[0], inside[0])


def test_autocast_leaves_fp64_alone():
    hidden, weight, _, targets = example()
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logprob(hidden, weight, targets).logprob
    assert torch.equal(inside, linear_logprob(hidden, weight, targets).logprob)


def test_rows_without_an_upstream_gradient_are_not_computed_again(monkeypatch):
    hidden, weight, bias, targets = example()
    used = torch.zeros(len(targets), dtype=torch.bool)
    used[[3, 17, 30]] = True
    logprob = linear_logprob(hidden, weight, targets, bias=bias).logprob
    rows = []
    forward = chunked.ChunkedHead.forward
    monkeypatch.setattr(
        chunked.ChunkedHead, "forward", lambda self, x, *a: (rows.append(len(x)), forward(self, x, *a))[1]
    )
    given = torch.autograd.grad(logprob[used].sum(), (hidden, weight, bias))
    assert sum(rows) == 3
    expected = torch.autograd.grad(full(hidden, weight, bias, targets)[0][used].sum(), (hidden, weight, bias))
    assert all(close(a, b) for a, b in zip(given, expected, strict=True))
    assert not given[0][~used].any()


@pytest.mark.parametrize("release", ["shape", "storage"])
def test_a_weight_released_before_the_backward_pass_is_an_error(release):
    hidden, weight, _, targets = example()
    logprob = linear_logprob(hidden, weight, targets).logprob
    if release == "shape":  # ZeRO-3
        weight.data = weight.data.new_empty(0)
    else:  # FSDP
        weight.untyped_storage().resize_(0)
    with pytest.raises(PactError, match="was released between the forward and the backward pass"):
        logprob.sum().backward()


def test_a_weight_changed_in_place_before_the_backward_pass_is_an_error():
    hidden, weight, _, targets = example()
    logprob = linear_logprob(hidden, weight, targets).logprob
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(PactError, match="changed in place"):
        logprob.sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature 0.0 of token 0 must be positive"),
        ({"temperature": -1.0}, "temperature -1.0 of token 0"),
        ({"targets": torch.zeros(37, dtype=torch.int32)}, r"token ids are int32; convert them with .long\(\)"),
    ],
)
def test_arguments_that_cannot_work_are_one_line_errors(options, message):
    hidden, weight, _, targets = example()
    with pytest.raises(PactError, match=message) as error:
        linear_logprob(hidden, weight, **{"targets": targets, **options})
    assert "\n" not in str(error.value)


def test_a_certain_target_has_logprob_zero_and_keeps_its_tiny_gradient():
    weight = torch.tensor([[40.0], [0.0], [0.0]], dtype=torch.float64)
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    logprob = linear_logprob(hidden, weight, torch.tensor([0])).logprob
    assert logprob.item() == pytest.approx(-2 * torch.tensor(-40.0, dtype=torch.float64).exp().item(), rel=0.2)
    extreme = linear_logprob(1e4 * hidden, weight, torch.tensor([0]))
    assert extreme.logprob.item() == 0.0
    extreme.logprob.sum().backward()
    assert hidden.grad.item() == 0.0


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_logits_of_all_rows_never_exist(backend, monkeypatch):
    rows, vocab = 2048, 20_000
    hidden, weight, _, targets = example(rows, 8, vocab, torch.float32)
    budget = 32 << 20
    monkeypatch.setattr(chunked, "LOGITS_BUDGET", budget)

    def run():
        value, entropy = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
        (value.sum() + entropy.sum()).backward()

    assert peak_bytes(run) < 2.5 * budget < 4 * rows * vocab


def test_no_rows():
    hidden, weight, _, targets = example(rows=0)
    logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True)
    assert logprob.shape == entropy.shape == (0,)
    (logprob.sum() + entropy.sum()).backward()
    assert not weight.grad.any()


def test_hidden_need_not_be_contiguous():
    hidden, weight, _, targets = example()
    twisted = hidden.detach().T.contiguous().T
    assert not twisted.is_contiguous()
    assert close(linear_logprob(twisted, weight, targets).logprob, linear_logprob(hidden, weight, targets).logprob)


def test_second_derivatives_are_an_error():
    hidden, weight, _, targets = example()
    logprob = linear_logprob(hidden, weight, targets).logprob
    with pytest.raises(PactError, match="second derivatives"):
        torch.autograd.grad(logprob.sum(), hidden, create_graph=True)


def test_backends_are_named_with_the_reason_why_not():
    live = backends()
    assert live["torch"] == "ready"
    hidden, weight, _, targets = example(rows=2, dtype=torch.float32)
    for name, reason in live.items():
        if reason == "ready":
            assert linear_logprob(hidden, weight, targets, backend=name).logprob.shape == (2,)
        else:
            with pytest.raises(PactError, match=re.escape(reason)):
                linear_logprob(hidden, weight, targets, backend=name)
    with pytest.raises(PactError, match="no such backend"):
        linear_logprob(hidden, weight, targets, backend="cuda")


def test_a_target_outside_the_vocabulary_is_an_error_not_a_read_elsewhere():
    hidden, weight, _, targets = example(dtype=torch.float32)
    for wrong in (-100, VOCAB):
        targets[3] = wrong
        with pytest.raises(PactError, match=f"target {wrong} of token 3"):
            linear_logprob(hidden, weight, targets)


def test_shapes_that_do_not_fit_are_one_line_errors():
    hidden, weight, bias, targets = example()
    with pytest.raises(PactError, match="targets"):
        linear_logprob(hidden, weight, targets[:-1])
    with pytest.raises(PactError, match="weight"):
        linear_logprob(hidden, weight[:, :-1], targets)
    with pytest.raises(PactError, match="bias"):
        linear_logprob(hidden, weight, targets, bias=bias[:-1])
    with pytest.raises(PactError, match="temperature"):
        linear_logprob(hidden, weight, targets, temperature=torch.ones(3))
