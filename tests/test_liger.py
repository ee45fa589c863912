"""The class in Liger's shape, against Liger's own and against full logits."""

from __future__ import annotations

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.integrations import liger

B, T, D, V = 4, 7, 16, 53


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = (t.requires_grad_() for t in (normal(B, T, D) / 4, normal(V, D), normal(V) / 4))
    mask = (torch.arange(T) < torch.tensor([[7], [4], [1], [0]])).long()
    near = lambda: -4.0 + 0.3 * normal(B, T).abs()  # noqa: E731
    return {
        "_input": hidden, "lin_weight": weight, "selected_token_ids": torch.randint(V, (B, T), generator=generator),
        "attention_mask": mask, "advantages": normal(B), "bias": bias, "ref_per_token_logps": near(),
        "old_per_token_logps": near(), "vllm_is_ratio": 1.0 + 0.1 * normal(B, T).abs(),
        "num_items_in_batch": torch.tensor(31.0),
    }  # fmt: skip


CASES = {
    "dapo": {"beta": 0.1, "temperature": 0.8},
    "grpo": {"beta": 0.0, "delta": 1.4},
    "bnpo": {"beta": 0.1, "use_bias_correction_kl": True},
    "dr_grpo": {"max_completion_length": 9},
    "cispo": {"epsilon_high": 1.2},
    "sapo": {"beta": 0.05},
    "grpo per sequence": {"importance_sampling_level": "sequence", "beta": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_metrics_and_gradients_are_ligers(case):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="install liger-kernel")
    options = CASES[case] | {"loss_type": case.split()[0]}
    results = []
    for cls, more in (
        (chunked_loss.LigerFusedLinearGRPOLoss, {"compiled": False}),
        (liger.LigerFusedLinearGRPOLoss, {}),
    ):
        given = inputs()
        loss, metrics = cls(**options, **more)(**given)
        loss.backward()
        results.append((loss, *metrics, *(given[name].grad for name in ("_input", "lin_weight", "bias"))))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-5, atol=2e-6)


def test_install_replaces_the_name_where_it_has_been_imported():
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="install liger-kernel")
    original = chunked_loss.LigerFusedLinearGRPOLoss
    undo = liger.install()
    assert chunked_loss.LigerFusedLinearGRPOLoss is liger.LigerFusedLinearGRPOLoss
    undo()
    assert chunked_loss.LigerFusedLinearGRPOLoss is original


def test_a_broken_kernel_is_an_error_on_the_first_batch(monkeypatch):
    from pact_fast.kernels.head import logprob

    op = logprob.linear_logprob_op
    monkeypatch.setattr(logprob, "linear_logprob_op", lambda *a: tuple(1.01 * x for x in op(*a)))
    with pytest.raises(PactError, match="Liger's GRPO loss: log-probs of the kernels"):
        liger.LigerFusedLinearGRPOLoss()(**inputs())


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "vespo"}, {"loss_type": "sapo", "importance_sampling_level": "sequence"}, {"loss_type": "dr_grpo"}],
)
def test_settings_that_are_not_served_are_errors(options):
    with pytest.raises(PactError, match="Liger's GRPO loss: loss_type"):
        liger.LigerFusedLinearGRPOLoss(**options)
