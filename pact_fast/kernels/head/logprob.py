"""linear_logprob: log-prob and entropy of given tokens under a linear head, without the [N, V] logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pact_fast.errors import PactError
from pact_fast.kernels.head.checks import check_head, check_present, check_targets, check_temperature, per_token
from pact_fast.kernels.head.chunked import ChunkedHead
from pact_fast.kernels.head.gemm import accumulation_dtype, autocast_dtype
from pact_fast.kernels.head.row_statistics import by_name, check_statistics, split_names


class _LogProbs(NamedTuple):
    logprob: torch.Tensor
    entropy: torch.Tensor | None


class LogProbs(_LogProbs):
    """Result of `linear_logprob`; fp32 (fp64 for fp64 input), in nats. A pair: `logprob, entropy = linear_logprob(…)`.

    logprob     [N]  log-prob of the target
    entropy     [N]  entropy of the distribution; None if not asked for
    statistics  {name: [N]}  the requested statistics, detached; not a part of the pair
    """

    statistics: dict[str, torch.Tensor]

    def __new__(
        cls, logprob: torch.Tensor, entropy: torch.Tensor | None, statistics: dict[str, torch.Tensor] | None = None
    ) -> LogProbs:
        pair = super().__new__(cls, logprob, entropy)
        pair.statistics = statistics or {}
        return pair


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    statistics: Sequence[str] = (),
    backend: str = "auto",
) -> LogProbs:
    """log softmax(z)[target] and the entropy of softmax(z); z = softcap·tanh(logit_scale·(hWᵀ + b)/softcap)/temperature.

    Replaces `log_softmax(lm_head(hidden)).gather(...)`. Logits and softmax are computed in fp32 (fp64 for fp64 input),
    chunk by chunk. Differentiable once in hidden, weight and bias; the backward pass recomputes the logits of rows whose
    results received a gradient. Under autocast, hidden and weight are multiplied in its dtype; nothing else changes.

    Args:
        hidden: [N, D] hidden states; fp64, fp32, bf16 or fp16.
        weight: [V, D] weight of the head, `lm_head.weight`.
        targets: [N] int64 token ids, one per row. There is no ignore_index: select rows, or use linear_cross_entropy.
        bias: [V] bias of the head.
        temperature: Divides the logits; a number or [N].
        softcap: Soft-cap of the logits; None: no cap.
        logit_scale: Positive factor of hWᵀ + b, before the soft-cap.
        entropy: Whether to return the entropy.
        statistics: What else to return, without gradient: "is_top1" (the target is the most likely token, bool),
            "mean_logit", "min_logit", "max_logit" (of z over the vocabulary), "log_sum_sq_probs" (log Σp²).
        backend: "auto", or one of `backends()`.

    Raises:
        PactError: Shapes do not fit, a target is not a token id, a temperature is not positive, or the backend does not
            support these tensors. In the backward pass: the weight has been released or changed in place since.
    """
    check_head(hidden, weight, bias)
    if targets.shape != hidden.shape[:1]:
        raise PactError(
            f"linear_logprob: targets {list(targets.shape)} must be one token id per row of hidden {list(hidden.shape)}"
        )
    temperatures, cap = fold_logit_scale(logit_scale, per_token(temperature, targets), softcap)
    names = check_statistics(statistics)
    logprob, entropies, values = linear_logprob_op(
        hidden, weight, bias, targets, temperatures, cap, backend, None, autocast_dtype(hidden, weight), names
    )  # fmt: skip
    return LogProbs(logprob, entropies if entropy else None, by_name(names, values))


def fold_logit_scale(
    scale: float, temperature: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, float | None]:
    """Temperature [N] and soft-cap that include the factor c of the logits, so that no kernel has to know it.

    s·tanh(c·y/s)/T = s'·tanh(y/s')/T' with s' = s/c and T' = T/c; without a soft-cap, c·y/T = y/T'. Raises PactError
    unless c is finite and positive.
    """
    if scale == 1.0:
        return temperature, softcap
    if not 0.0 < scale < math.inf:
        raise PactError(f"logit_scale={scale} must be positive and finite")
    return temperature / scale, softcap / scale if softcap else softcap


def refuse_second_derivatives() -> None:
    """Raise PactError in a backward pass with create_graph=True: our gradients have no graph to differentiate."""
    if torch.is_grad_enabled():
        raise PactError(
            "linear_logprob and pact_loss have no second derivatives; call backward without create_graph=True"
        )


def gradient_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The parameter's dtype; fp32 for fp16, so that small gradients do not underflow before the loss scale is applied."""
    return torch.float32 if parameter.dtype == torch.float16 else parameter.dtype


@torch.library.custom_op("pact_fast::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    softcap: float | None,
    backend: str,
    ignore_index: int | None = None,
    operand_dtype: torch.dtype | None = None,
    statistics: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob [N], entropy [N], statistics [K, N]); 0 where the target is `ignore_index`.

    operand_dtype: of the GEMMs, see `as_operands`. statistics: names, see `check_statistics`.
    """
    check_targets(targets, len(weight), ignore_index)
    check_temperature(temperature)
    kept = None if ignore_index is None else (targets != ignore_index).nonzero().squeeze(1)
    total = len(hidden) if kept is None else len(kept)
    logprob = torch.zeros(len(hidden), dtype=accumulation_dtype(hidden, weight), device=hidden.device)
    entropy, names = torch.zeros_like(logprob), split_names(statistics)
    values = logprob.new_zeros(len(names), len(logprob))
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight = as_operands(operand_dtype, hidden, weight)
        head = ChunkedHead(backend, hidden, weight, bias, softcap, total, statistics=names)
        for chunk in head.chunks():
            at = chunk if kept is None else kept[chunk]
            stats = head.forward(hidden[at], targets[at], temperature[at])
            logprob[at], entropy[at] = stats.logprob, stats.entropy
            if names:
                values[:, at] = head.row_statistics()
    return logprob, entropy, values


def as_operands(
    dtype: torch.dtype | None, hidden: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden and weight in the dtype in which they are multiplied; None: as they are.

    Cast inside the ops: gradients are then rounded once, from the accumulator to the parameter's dtype, and no copy of the
    weight lives until the backward pass.
    """
    return (hidden, weight) if dtype is None else (hidden.to(dtype), weight.to(dtype))


@torch.library.custom_op("pact_fast::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    g: torch.Tensor,
    h: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    softcap: float | None,
    backend: str,
    grads: Sequence[bool],
    ignore_index: int | None = None,
    operand_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; empty tensors where `grads` is False."""
    check_present(hidden, weight, bias)
    active = g.ne(0) if h is None else g.ne(0) | h.ne(0)
    if ignore_index is not None:
        active &= targets != ignore_index
    rows = active.nonzero().squeeze(1)  # the logits of other rows are not computed again
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if grads[0] else hidden.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        needs = grads[0], grads[1], grads[2]
        x, w = as_operands(operand_dtype, hidden, weight)
        head = ChunkedHead(backend, x, w, bias, softcap, len(rows), needs, entropy_grad=h is not None)
        for chunk in head.chunks():
            at = rows[chunk]
            head.forward(x[at], targets[at], temperature[at])
            source, dx = head.backward(g[at], None if h is None else h[at])
            if dx is not None:
                d_hidden[at[source]] = dx.to(hidden.dtype)
    d_weight, d_bias = head.weight_grads()
    return d_hidden, cast_gradient(d_weight, weight), cast_gradient(d_bias, bias if bias is not None else weight)


def cast_gradient(gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient in the dtype that an op returns; an empty tensor for None."""
    if gradient is None:
        return parameter.new_empty(0, dtype=gradient_dtype(parameter))
    return gradient.to(gradient_dtype(parameter))


@linear_logprob_op.register_fake
def _(
    hidden, weight, bias, targets, temperature, softcap, backend, ignore_index=None, operand_dtype=None, statistics=""
):
    logprob = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden, weight))
    return logprob, torch.empty_like(logprob), logprob.new_empty(len(split_names(statistics)), len(hidden))


@linear_logprob_backward_op.register_fake
def _(g, h, hidden, weight, bias, targets, temperature, softcap, backend, grads, ignore_index=None, operand_dtype=None):
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if grads[0] else hidden.new_empty(0)
    return d_hidden, *fake_weight_grads(weight, bias, grads)


def fake_weight_grads(weight: torch.Tensor, bias: torch.Tensor | None, grads: Sequence[bool]) -> list[torch.Tensor]:
    """Weight and bias gradients of an op's fake implementation: shapes and dtypes only."""
    parameters = [weight, bias if bias is not None else weight]
    return [
        p.new_empty(p.shape if needed else (0,), dtype=gradient_dtype(p))
        for p, needed in zip(parameters, grads[1:], strict=True)
    ]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, targets, temperature, *ctx.settings, _ = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, temperature)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, g: torch.Tensor | None, h: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    refuse_second_derivatives()
    hidden, weight, bias, targets, temperature = _saved(ctx)
    if g is None:
        g = torch.zeros_like(targets, dtype=accumulation_dtype(hidden, weight))
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_logprob_backward_op(
        g, h, hidden, weight, bias, targets, temperature, *ctx.settings[:2], needs, *ctx.settings[2:]
    )  # fmt: skip
    parameters = (hidden, weight, bias)
    input_grads = [d.to(p.dtype) if need else None for d, p, need in zip(gradients, parameters, needs, strict=True)]
    return *input_grads, None, None, None, None, None, None, None


def _saved(ctx: Any) -> tuple[torch.Tensor, ...]:
    """The saved tensors. Raises PactError if one was changed in place."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise PactError(
            "linear_logprob: hidden, weight or bias was changed in place between the forward and the backward pass; call "
            "backward before optimizer.step() or any other update"
        ) from error


linear_logprob_op.register_autograd(_backward, setup_context=_setup)
