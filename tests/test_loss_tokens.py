"""LossTokens: defaults, tables of padded batches, and columns that cannot work."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pact_fast.components import Component, LossContext
from pact_fast.errors import PactError
from pact_fast.kernels import LossTokens, pact_loss, summarise
from tests.support.loss_inputs import ROWS, VOCAB, WIDTH, inputs, tokens
from tests.support.memory import peak_bytes

B, L, C = 3, 7, 4  # sequences, their length, the length of their completions


def batch(seed: int = 0):
    """hidden, weight, ids [B, L], mask [B, C] with one empty sequence, advantages [B], three log-probs [B, C]; fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(VOCAB, (B, L), generator=generator)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    hidden, weight = normal(B, L, WIDTH).requires_grad_(), normal(VOCAB, WIDTH).requires_grad_()
    return hidden, weight, ids, mask, normal(B), [0.1 * normal(B, C) - 3.4 for _ in range(3)]


def completion_logprobs(hidden, weight, ids):
    """[B, C], by full logits."""
    return (hidden @ weight.T)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][:, -C:]


def grpo(logprob, old, ref, advantage, beta):
    """[B, C] loss of every token, from the formulas of GRPO."""
    ratio = (logprob - old).exp()
    a = advantage[:, None]
    d = ref - logprob
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) + beta * (d.exp() - d - 1)


def aggregated(loss, mask, normalise):
    mask = mask.double()
    if normalise == "token":
        return (loss * mask).sum() / mask.sum()
    if normalise == "sequence":
        return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    return (loss * mask).sum() / (B * normalise)


@pytest.mark.parametrize("normalise", ["token", "sequence", 5])
def test_a_padded_batch_has_the_loss_and_gradients_of_full_logits(normalise):
    hidden, weight, ids, mask, advantage, (old, ref, _) = batch()
    table = LossTokens.from_batch(ids, mask, advantage, old, ref_logprobs=ref, normalise=normalise)
    given = pact_loss(hidden.flatten(0, 1), weight, table, kl_coef=0.1).loss
    expected = aggregated(grpo(completion_logprobs(hidden, weight, ids), old, ref, advantage, 0.1), mask, normalise)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (given, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("normalise", ["token", "sequence", 5])
def test_micro_batches_with_the_count_of_the_step_add_up(normalise):
    hidden, weight, ids, mask, advantage, (old, _, sampled) = batch()
    count = float(mask.sum()) if normalise == "token" else B

    def loss(rows, **options):
        columns = [t[rows] for t in (ids, mask, advantage, old)]
        table = LossTokens.from_batch(*columns, sampler_logprobs=sampled[rows], normalise=normalise, **options)
        return pact_loss(hidden[rows].flatten(0, 1), weight, table, importance_cap=1.1).loss

    parts = loss(slice(0, 1), count=count) + loss(slice(1, B), count=torch.tensor(count))
    torch.testing.assert_close(parts, loss(slice(0, B)), rtol=1e-12, atol=0)


def test_without_advantages_the_table_is_that_of_sft():
    hidden, weight, ids, mask, *_ = batch()
    table = LossTokens.from_batch(ids, mask)
    assert (table.context == LossContext.EXPERT).all() and not table.rl_weight.any()
    expected = aggregated(-completion_logprobs(hidden, weight, ids), mask, "token")
    torch.testing.assert_close(pact_loss(hidden.flatten(0, 1), weight, table).loss, expected, rtol=1e-12, atol=0)


def test_columns_hold_the_last_tokens_of_every_row_whatever_their_length():
    _, _, ids, mask, advantage, (old, *_) = batch()
    short = LossTokens.from_batch(ids, mask, advantage, old)
    filled = [torch.nn.functional.pad(t, (L - C, 0)) for t in (mask, old)]
    whole = LossTokens.from_batch(ids, filled[0], advantage[:, None].expand(B, L), filled[1])
    shifted = LossTokens.from_batch(ids, filled[0][:, 1:], advantage, filled[1][:, 1:])
    for table in (whole, shifted):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(table.columns(), short.columns(), strict=True))


def test_a_first_token_has_no_loss():
    ids = torch.arange(6).view(2, 3)
    table = LossTokens.from_batch(ids, torch.ones(2, 3), 1.0)
    assert table.target.tolist() == [1, 2, 4, 5] and table.row.tolist() == [0, 1, 3, 4]
    assert table.sequence.tolist() == [0, 0, 1, 1] and table.rl_weight.tolist() == [0.25] * 4


def test_a_batch_without_a_token_has_an_empty_table_and_loss_zero():
    hidden, weight, ids, mask, advantage, _ = batch()
    for normalise in ("token", "sequence", 5):
        table = LossTokens.from_batch(ids, 0 * mask, advantage, normalise=normalise)
        loss = pact_loss(hidden.flatten(0, 1), weight, table).loss
        assert len(table) == 0 and loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": torch.zeros(6)}, r"input_ids \[6\] must be \[B, L\]"),
        ({"mask": torch.ones(2, 4)}, r"mask \[2, 4\] must be \[3, C\] with C ≤ 7"),
        ({"mask": torch.ones(3, 8)}, r"mask \[3, 8\]"),
        ({"old_logprobs": torch.ones(3, 2)}, r"old_logprobs \[3, 2\] has no entry for some tokens in mask"),
        ({"advantages": torch.ones(4)}, r"advantages \[4\]"),
        ({"normalise": "batch"}, "normalise='batch' must be 'token', 'sequence' or a positive length"),
        ({"normalise": 0}, "normalise=0"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_a_one_line_error(change, message):
    _, _, ids, mask, advantage, (old, *_) = batch()
    arguments = {"input_ids": ids, "mask": mask, "advantages": advantage, "old_logprobs": old}
    with pytest.raises(PactError, match=message) as error:
        LossTokens.from_batch(**{**arguments, **change})
    assert "\n" not in str(error.value)


def test_only_rows_targets_and_what_the_loss_needs_must_be_given():
    hidden, weight, _ = inputs(torch.float64)
    row, target = torch.arange(4, dtype=torch.int32), torch.tensor([1, 5, 7, 30])
    logprob = (hidden[:4] @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    for options, expected in (
        ({"sft_weight": 0.25}, -logprob.mean()),
        ({"sft_weight": torch.tensor([1, 0, 1, 0])}, -logprob[0] - logprob[2]),
        ({"rl_weight": 0.5, "advantage": 2.0}, -4.0 * torch.ones(())),  # ratio 1: −A·w, with the gradient of −A·w·log π
        ({}, torch.zeros(())),
    ):
        out = pact_loss(hidden, weight, LossTokens(row, target, **options))
        torch.testing.assert_close(out.loss, expected.double())
        torch.testing.assert_close(out.logprob, logprob)
    values = summarise(
        pact_loss(hidden, weight, LossTokens(row, target, advantage=1.0, rl_weight=torch.tensor(0.5))).stats
    )
    assert values["prompt/tokens"] == values["prompt/answer/tokens"] == 4 and values["prompt/ratio"] == 1.0


def test_numbers_are_the_columns_that_they_stand_for():
    row = torch.arange(3)
    table = LossTokens(row, row, LossContext.TRACE, Component.REASONING, row, 0.5, -1.0, 0.25, 2.0, -3.0, -4.0)
    for (name, column), value in zip(
        table.named_columns()[2:], (1, 1, row, 0.5, -1.0, 0.25, 2.0, -3.0, -4.0), strict=True
    ):
        assert column.shape == (3,) and (column == value).all(), name
    assert table.context.dtype == torch.int64 and table.advantage.dtype == torch.float32
    assert len(dataclasses.replace(table, sampler_logprob=None).select(row == 1)) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"advantage": 1.0}, "advantage without rl_weight"),
        ({"rl_weight": 1.0}, "rl_weight without advantage"),
        ({"sft_weight": torch.ones(3)}, r"sft_weight \[3\] must be a number or have one entry per row \[20\]"),
        ({"component": torch.zeros(20)}, "component is float32; it must be an integer type"),
        ({"sequence": torch.zeros(20, dtype=torch.bool)}, "sequence is bool"),
        ({"old_logprob": torch.zeros(20, dtype=torch.complex64)}, "old_logprob is complex"),
        ({"row": torch.zeros(4, 5, dtype=torch.int64)}, r"row \[4, 5\] must be \[N\]"),
    ],
)
def test_columns_that_cannot_work_are_one_line_errors(options, message):
    table = tokens()
    with pytest.raises(PactError, match=message) as error:
        LossTokens(**{"row": table.row, "target": table.target, **options})
    assert "\n" not in str(error.value)


WRONG = [
    ("row", ROWS, f"row {ROWS} of token 3 is outside the {ROWS} rows of hidden"),
    ("row", -1, "row -1 of token 3"),
    ("target", VOCAB, f"target {VOCAB} of token 3 is outside the vocabulary of {VOCAB}"),
    ("context", 3, "context 3 of token 3 is no LossContext"),
    ("component", 6, "component 6 of token 3 is no Component"),
    ("component", -1, "component -1 of token 3"),
    ("temperature", 0.0, "temperature 0.0 of token 3 must be positive"),
    ("temperature", -0.5, "temperature -0.5 of token 3"),
    ("temperature", math.nan, "temperature nan of token 3"),
]


@pytest.mark.parametrize("column, value, message", WRONG)
def test_a_value_out_of_range_is_a_one_line_error(column, value, message):
    hidden, weight, _ = inputs()
    table, temperature = tokens(), torch.ones(20)
    (temperature if column == "temperature" else getattr(table, column))[3] = value
    with pytest.raises(PactError, match=message) as error:
        pact_loss(hidden, weight, table, temperature=temperature)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("column, value, message", WRONG[::3])
def test_a_value_out_of_range_is_an_error_in_compiled_graphs_too(column, value, message):
    hidden, weight, _ = inputs()
    table, temperature = tokens(), torch.ones(20)
    (temperature if column == "temperature" else getattr(table, column))[3] = value
    torch._dynamo.reset()
    run = torch.compile(
        lambda table, t: pact_loss(2.0 * hidden, weight, table, temperature=t).loss, fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(PactError, match=message):
        run(table, temperature)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("target", torch.zeros(20), "target is float32; it must be an integer type"),
        ("component", torch.zeros(3, dtype=torch.int64), r"component \[3\] must be a number or have one entry per row"),
        ("sft_weight", torch.zeros(20, device="meta"), "tokens.sft_weight is on meta, hidden on cpu"),
    ],
)
def test_a_column_replaced_by_one_that_does_not_fit_is_a_one_line_error(column, value, message):
    hidden, weight, _ = inputs()
    table = tokens()
    setattr(table, column, value)
    with pytest.raises(PactError, match=message):
        pact_loss(hidden, weight, table)


def test_a_ratio_per_sequence_needs_sequences():
    hidden, weight, _ = inputs()
    table = dataclasses.replace(tokens(), sequence=None)
    pact_loss(hidden, weight, table)
    with pytest.raises(PactError, match="'gspo' needs an id per sequence"):
        pact_loss(hidden, weight, table, policy_loss="gspo")


def test_tables_with_and_without_a_column_do_not_concatenate():
    whole = tokens()
    assert len(LossTokens.cat([whole, whole])) == 40
    with pytest.raises(PactError, match="1 of 2 tables have no ref_logprob"):
        LossTokens.cat([whole, dataclasses.replace(whole, ref_logprob=None)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_gets_a_gradient_in_the_rows_that_are_read_and_zeros_elsewhere(dtype):
    hidden, weight, _ = inputs(dtype)
    table = tokens()
    table.row = table.row // 2 * 2 % 6  # three rows, each read by several tokens
    (given,) = torch.autograd.grad(pact_loss(hidden, weight, table).loss, hidden)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (expected,) = torch.autograd.grad(pact_loss(*exact, table).loss, exact[0])
    assert not given[[1, 3, 5, 6, 7, 8, 9, 10, 11]].any() and given[[0, 2, 4]].all()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (given.double() - expected).norm() <= tolerance * expected.norm()


def test_rows_that_no_token_reads_have_no_accumulator():
    _, weight, _ = inputs(torch.bfloat16)
    hidden = torch.randn(400_000, WIDTH, dtype=torch.bfloat16, requires_grad=True)

    def run():
        pact_loss(hidden, weight, tokens()).loss.backward()
        hidden.grad = None

    run()
    assert peak_bytes(run) < 1.5 * hidden.nbytes  # the gradient; sums of all rows in fp32 would be twice as large
