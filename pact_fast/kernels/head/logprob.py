"""linear_logprob: log-prob and entropy of given tokens under a linear head, without the [N, V] logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pact_fast.errors import PactError
from pact_fast.kernels.head.chunked import ChunkedHead
from pact_fast.kernels.head.gemm import accumulation_dtype


class LogProbs(NamedTuple):
    """Result of `linear_logprob`; fp32 (fp64 for fp64 input), in nats.

    logprob  [N]  log-prob of the target
    entropy  [N]  entropy of the distribution; None if not asked for
    """

    logprob: torch.Tensor
    entropy: torch.Tensor | None


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
    backend: str = "auto",
) -> LogProbs:
    """log softmax(z)[target] and the entropy of softmax(z); z = softcap·tanh(logit_scale·(hWᵀ + b)/softcap)/temperature.

    Replaces `log_softmax(lm_head(hidden)).gather(...)`. Logits and softmax are computed in fp32 (fp64 for fp64 input),
    chunk by chunk. Differentiable once in hidden, weight and bias; the backward pass recomputes the logits.

    Args:
        hidden: [N, D] hidden states; fp64, fp32, bf16 or fp16.
        weight: [V, D] weight of the head, `lm_head.weight`.
        targets: [N] int64 token ids, one per row. There is no ignore_index: select rows instead.
        bias: [V] bias of the head.
        temperature: Divides the logits; a number or [N].
        softcap: Soft-cap of the logits; None: no cap.
        logit_scale: Positive factor of hWᵀ + b, before the soft-cap.
        entropy: Whether to return the entropy.
        backend: "auto", or one of `backends()`.

    Raises:
        PactError: Shapes do not fit, a target is no token id, or the backend does not support these tensors.
    """
    check_head(hidden, weight, bias)
    if targets.shape != hidden.shape[:1]:
        raise PactError(
            f"linear_logprob: targets {list(targets.shape)} must be one token id per row of hidden {list(hidden.shape)}"
        )
    temperatures, cap = fold_logit_scale(logit_scale, per_token(temperature, targets), softcap)
    logprob, entropies = linear_logprob_op(hidden, weight, bias, targets, temperatures, cap, backend)
    return LogProbs(logprob, entropies if entropy else None)


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise PactError unless hidden is [·, D], weight [V, D] and bias [V] or None."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise PactError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, D] and [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PactError(f"bias {list(bias.shape)} must have one entry per row of weight {list(weight.shape)}")


def check_targets(targets: torch.Tensor, vocab: int) -> None:
    """Raise PactError unless all targets are in [0, vocab): the kernels index logits with them.

    Runs inside the custom ops, so that compiled graphs check it too. On CUDA it is a device-side assertion, which needs
    no synchronisation.
    """
    outside = (targets < 0) | (targets >= vocab)
    if targets.is_cuda:
        torch._assert_async(~outside.any(), "pact_fast: a target is outside the vocabulary")
    elif outside.any():
        token = int(outside.nonzero()[0])
        raise PactError(
            f"target {int(targets[token])} of token {token} is outside the vocabulary of {vocab} (rows of weight); "
            "leave out tokens without a loss instead of marking them with an id like -100"
        )


def per_token(temperature: float | torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[N] temperature of every token, fp64 if a number is given. Raises PactError if a tensor has another shape."""
    if not isinstance(temperature, torch.Tensor):
        return torch.full(targets.shape, temperature, dtype=torch.float64, device=targets.device)
    if temperature.shape != targets.shape:
        raise PactError(
            f"temperature {list(temperature.shape)} must be a number or one entry per token [{len(targets)}]"
        )
    return temperature


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob [N], entropy [N])."""
    check_targets(targets, len(weight))
    logprob = torch.empty(len(hidden), dtype=accumulation_dtype(hidden, weight), device=hidden.device)
    entropy = torch.empty_like(logprob)
    with torch.autocast(hidden.device.type, enabled=False):
        head = ChunkedHead(backend, hidden, weight, bias, softcap, len(hidden))
        for chunk in head.chunks():
            stats = head.forward(hidden[chunk], targets[chunk], temperature[chunk])
            logprob[chunk], entropy[chunk] = stats.logprob, stats.entropy
    return logprob, entropy


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias; empty tensors where `grads` is False."""
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if grads[0] else hidden.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        needs = grads[0], grads[1], grads[2]
        head = ChunkedHead(backend, hidden, weight, bias, softcap, len(hidden), needs, entropy_grad=h is not None)
        for chunk in head.chunks():
            head.forward(hidden[chunk], targets[chunk], temperature[chunk])
            source, dx = head.backward(g[chunk], None if h is None else h[chunk])
            if dx is not None:
                d_hidden[chunk.start + source] = dx.to(hidden.dtype)
    d_weight, d_bias = head.weight_grads()
    return d_hidden, cast_gradient(d_weight, weight), cast_gradient(d_bias, bias if bias is not None else weight)


def cast_gradient(gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient in the dtype that an op returns; an empty tensor for None."""
    if gradient is None:
        return parameter.new_empty(0, dtype=gradient_dtype(parameter))
    return gradient.to(gradient_dtype(parameter))


@linear_logprob_op.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, backend):
    logprob = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden, weight))
    return logprob, torch.empty_like(logprob)


@linear_logprob_backward_op.register_fake
def _(g, h, hidden, weight, bias, targets, temperature, softcap, backend, grads):
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
    hidden, weight, bias, targets, temperature, ctx.softcap, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, temperature)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: torch.Tensor | None, h: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    refuse_second_derivatives()
    hidden, weight, bias, targets, temperature = ctx.saved_tensors
    if g is None:
        g = torch.zeros_like(targets, dtype=accumulation_dtype(hidden, weight))
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_logprob_backward_op(
        g, h, hidden, weight, bias, targets, temperature, ctx.softcap, ctx.backend, needs
    )  # fmt: skip
    parameters = (hidden, weight, bias)
    input_grads = [d.to(p.dtype) if need else None for d, p, need in zip(gradients, parameters, needs, strict=True)]
    return *input_grads, None, None, None, None


linear_logprob_op.register_autograd(_backward, setup_context=_setup)
