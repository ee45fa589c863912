"""linear_cross_entropy against torch's cross_entropy of full logits in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pact_fast.errors import PactError
from pact_fast.kernels import linear_cross_entropy, linear_logprob
from pact_fast.kernels.head import chunked

B, L, D, V = 3, 9, 6, 53


def example(dtype: torch.dtype = torch.float64, ignored: int = -100):
    """hidden [B, L, D], weight, bias, and labels [B, L] of which a third is ignored."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((B, L, D), (V, D), (V,)))
    labels = torch.randint(V, (B, L)).masked_fill(torch.rand(B, L) < 0.3, ignored)
    return *(t.to(dtype).requires_grad_() for t in (hidden, weight, bias)), labels


def full(hidden, weight, labels, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, ignore_index=-100,
         reduction="mean", shift=False):  # fmt: skip
    """The definition, with all logits at once."""
    z = hidden @ weight.T
    z = logit_scale * (z if bias is None else z + bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature)
    if shift:
        z, labels = z[..., :-1, :], labels[..., 1:]
    losses = F.cross_entropy(z.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction=reduction)
    return losses.view(labels.shape) if reduction == "none" else losses


OPTIONS = {
    "plain": {},
    "shifted": {"shift": True},
    "everything": {"logit_scale": 0.5, "softcap": 3.0, "temperature": 0.7, "shift": True},
    "temperatures": {"temperature": torch.linspace(0.5, 1.5, B * L, dtype=torch.float64).view(B, L)},
    "another ignored label": {"ignore_index": 7},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_those_of_torch(name, reduction):
    options = OPTIONS[name] | {"reduction": reduction}
    hidden, weight, bias, labels = example(ignored=options.get("ignore_index", -100))
    given = linear_cross_entropy(hidden, weight, labels, bias=bias, **options)
    expected = full(hidden, weight, labels, bias=bias, **options)
    torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-12)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        *(torch.autograd.grad(loss, (hidden, weight, bias), upstream) for loss in (given, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    hidden, weight, *_ = example()
    arguments = hidden[:1, :4].detach().requires_grad_(), weight[:5].detach().requires_grad_()
    labels = torch.tensor([[1, -100, 4, 0]])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, softcap=2.0, reduction=reduction), arguments
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_a_kept_label_it_does_as_torch_does(reduction):
    hidden, weight, _, labels = example()
    labels = torch.full_like(labels, -100)
    given, expected = (f(hidden, weight, labels, reduction=reduction) for f in (linear_cross_entropy, full))
    torch.testing.assert_close(given, expected, equal_nan=True)
    assert given.isnan().all() == (reduction == "mean")
    for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (given, expected)), strict=True):
        assert torch.equal(a, b) and not a.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_cost_nothing(reduction, monkeypatch):
    hidden, weight, _, labels = example(torch.float32)
    rows = []
    forward = chunked.ChunkedHead.forward
    monkeypatch.setattr(
        chunked.ChunkedHead, "forward", lambda self, x, *a: (rows.append(len(x)), forward(self, x, *a))[1]
    )
    linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum().backward()
    kept = int((labels != -100).sum())
    assert sum(rows) == kept * (1 if reduction == "mean" else 2) and kept < labels.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_linear_logprob_of_the_kept_rows(dtype):
    hidden, weight, _, labels = example(dtype)
    kept = labels != -100
    given = linear_cross_entropy(hidden, weight, labels)
    expected = -linear_logprob(hidden[kept], weight, labels[kept]).logprob.mean()
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (given, expected)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol={torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype], atol=1e-4)


def test_under_autocast_the_weight_gradient_keeps_the_weights_dtype():
    hidden, weight, _, labels = example(torch.float32)
    hidden = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert torch.equal(loss, linear_cross_entropy(hidden, weight.bfloat16(), labels))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.full((B, L), V)}, f"target {V} of token 0 is outside the vocabulary of {V}"),
        ({"labels": torch.full((B, L), -1)}, "mark tokens without a loss with ignore_index=-100"),
        ({"labels": torch.zeros(B, L)}, "token ids are float32"),
        ({"labels": torch.zeros(B, L - 1, dtype=torch.int64)}, "one token id per row of hidden"),
        ({"reduction": "max"}, "reduction='max' is unknown"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"bias": torch.zeros(3)}, "bias"),
    ],
)
def test_arguments_that_cannot_work_are_one_line_errors(change, message):
    hidden, weight, _, labels = example()
    with pytest.raises(PactError, match=message) as error:
        linear_cross_entropy(hidden, weight, **{"labels": labels, **change})
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_losses_and_gradients_are_the_eager_ones(reduction):
    hidden, weight, bias, labels = example(torch.float32)

    def run(hidden, weight, bias):
        return (
            0.5 * linear_cross_entropy(hidden * 2.0, weight, labels, bias=bias, shift=True, reduction=reduction).sum()
        )

    torch._dynamo.reset()
    values = [f(hidden, weight, bias) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run)]
    torch.testing.assert_close(*values)
    for a, b in zip(*(torch.autograd.grad(v, (hidden, weight, bias)) for v in values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_autocast_is_the_eager_one():
    hidden, weight, _, labels = example(torch.float32)

    def run(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(hidden * 2.0, weight, labels)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert torch.equal(compiled, run(hidden, weight))
    assert torch.autograd.grad(compiled, weight)[0].dtype == torch.float32


def test_opcheck():
    from pact_fast.kernels.head.cross_entropy import linear_cross_entropy_op

    hidden, weight, bias, labels = example(torch.float32)
    settings = dict(softcap=None, ignore_index=-100, mean=True, backend="torch", operand_dtype=None, grads=[True] * 3)
    arguments = (hidden.flatten(0, 1).detach().requires_grad_(), weight, bias, labels.flatten(), torch.ones(B * L))
    torch.library.opcheck(linear_cross_entropy_op, arguments, settings)
