"""linear_cross_entropy: cross-entropy of a linear head with ignored labels, without the [N, V] logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from pact_fast.components import LossContext
from pact_fast.errors import PactError
from pact_fast.kernels.head.checks import check_head, check_targets, check_temperature, per_token
from pact_fast.kernels.head.gemm import accumulation_dtype, autocast_dtype
from pact_fast.kernels.head.logprob import fake_weight_grads, fold_logit_scale, gradient_dtype, linear_logprob_op
from pact_fast.kernels.head.loss import save_gradients, scaled_gradients
from pact_fast.kernels.head.loss_pass import evaluate
from pact_fast.kernels.head.objective import LossSettings, make_policy_loss
from pact_fast.kernels.head.tokens import LossTokens


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    shift: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """`F.cross_entropy(lm_head(hidden), labels, ignore_index=…, reduction=…)`, computed for the kept rows only.

    Softmax and loss are computed in fp32 (fp64 for fp64 input), logits as in `linear_logprob`. Differentiable once in
    hidden, weight and bias. "mean" and "sum" form the gradients in the pass that computes the logits; "none" computes the
    logits again in the backward pass. Under autocast, hidden and weight are multiplied in its dtype.

    Args:
        hidden: [..., D] hidden states; fp64, fp32, bf16 or fp16.
        weight: [V, D] weight of the head, `lm_head.weight`.
        labels: [...] int64 token ids, or `ignore_index`.
        bias: [V] bias of the head.
        logit_scale: Positive factor of hWᵀ + b, before the soft-cap.
        softcap: Soft-cap of the logits; None: no cap.
        temperature: Divides the logits; a number or [...].
        ignore_index: Label of rows without a loss: they cost nothing and get a gradient of exactly 0.
        reduction: "mean" over kept rows, "sum", or "none". As in torch, the mean of no row is NaN (its gradients are 0),
            the sum is 0, and "none" gives 0 for ignored rows.
        shift: labels are those of the hidden states' own tokens, as in a Hugging Face batch: labels[..., t + 1] belongs to
            hidden[..., t, :]. The first label of a sequence is not used.
        backend: "auto", or one of `backends()`.

    Returns:
        fp32 (fp64 for fp64 input), in nats: a scalar, or for "none" [...], with `shift` one entry less in the last
        dimension.

    Raises:
        PactError: Shapes do not fit, a label is neither a token id nor `ignore_index`, a temperature is not positive, the
            reduction is unknown, or the backend does not support these tensors.
    """
    if reduction not in ("mean", "sum", "none"):
        raise PactError(f"reduction='{reduction}' is unknown; use 'mean', 'sum' or 'none'")
    if hidden.ndim < 1 or labels.shape != hidden.shape[:-1] or (shift and labels.ndim < 1):
        raise PactError(f"labels {list(labels.shape)} must be one token id per row of hidden {list(hidden.shape)}")
    x, shape = hidden.reshape(-1, hidden.shape[-1]), labels.shape
    check_head(x, weight, bias)
    temperatures = per_token(temperature, labels)
    if shift:  # the last hidden state of a sequence has no label
        labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], -1)
    folded, cap = fold_logit_scale(logit_scale, temperatures.reshape(-1), softcap)
    flat, dtype = labels.reshape(-1), autocast_dtype(hidden, weight)
    if reduction == "none":
        logprob, *_ = linear_logprob_op(x, weight, bias, flat, folded, cap, backend, ignore_index, dtype)
        losses = -logprob.view(shape)
        return losses[..., :-1] if shift else losses
    grads = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (x, weight, bias)]
    return linear_cross_entropy_op(
        x, weight, bias, flat, folded, softcap=cap, ignore_index=ignore_index, mean=reduction == "mean",
        backend=backend, operand_dtype=dtype, grads=grads,
    )[0]  # fmt: skip


@torch.library.custom_op("pact_fast::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    temperature: torch.Tensor,
    *,
    softcap: float | None,
    ignore_index: int,
    mean: bool,
    backend: str,
    operand_dtype: torch.dtype | None,
    grads: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, d_hidden, d_weight, d_bias) of the rows whose label is not `ignore_index`; see `pact_loss_op`.

    Rows are selected in here, because their number depends on values: a compiled graph would break at it.
    """
    check_targets(labels, len(weight), ignore_index)
    check_temperature(temperature)
    kept = (labels != ignore_index).nonzero().squeeze(1)
    weights = 1.0 / len(kept) if mean and len(kept) else 1.0
    tokens = LossTokens(row=kept, target=labels[kept], context=LossContext.EXPERT, sft_weight=weights)
    settings = LossSettings(make_policy_loss("ppo"), (None, None), None, 0.0, 0.0, None, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, *_, d_hidden, d_weight, d_bias = evaluate(
            hidden, weight, bias, tokens, temperature[kept], settings, None, backend, operand_dtype,
            (grads[0], grads[1], grads[2]),
        )  # fmt: skip
    if mean and not len(kept):
        loss = torch.full_like(loss, math.nan)
    return loss, d_hidden, d_weight, d_bias


@linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, temperature, *, grads, **settings):
    loss = hidden.new_empty((), dtype=accumulation_dtype(hidden, weight))
    d_hidden = hidden.new_empty(hidden.shape if grads[0] else (0,), dtype=gradient_dtype(hidden))
    return loss, d_hidden, *fake_weight_grads(weight, bias, grads)


linear_cross_entropy_op.register_autograd(scaled_gradients, setup_context=save_gradients)
