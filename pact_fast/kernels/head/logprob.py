"""Log-prob and entropy of given tokens under a linear head, without the [N, V] logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pact_fast.errors import PactError
from pact_fast.kernels.head.chunked import ChunkedHead
from pact_fast.kernels.head.gemm import accumulation_dtype


class LogProbs(NamedTuple):
    """[N] each, fp32 (fp64 for fp64 input), in nats."""

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
    entropy: bool = False,
    backend: str = "auto",
) -> LogProbs:
    """log softmax(z)[target] and, if asked for, the entropy of softmax(z).

    z = softcap·tanh((hWᵀ + b)/softcap)/temperature. hidden [N, D], weight [V, D] and bias [V] in fp64, fp32, bf16 or
    fp16; targets [N] int64; temperature a number or [N]. Logits and softmax are fp32 (fp64 for fp64 input).
    Differentiable once in hidden, weight and bias; the backward pass computes the logits again, chunk by chunk. Raises
    PactError when shapes do not fit, a target is no token id, or the back-end cannot serve.
    """
    check_head(hidden, weight, bias)
    if targets.shape != hidden.shape[:1]:
        raise PactError(
            f"linear_logprob: targets {list(targets.shape)} must be one token id per row of hidden {list(hidden.shape)}"
        )
    logprob, entropies = _linear_logprob(
        hidden, weight, bias, targets, per_token(temperature, targets), softcap, backend
    )  # fmt: skip
    return LogProbs(logprob, entropies if entropy else None)


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """hidden [·, D], weight [V, D], bias [V] or None; PactError otherwise."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise PactError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, D] and [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PactError(f"bias {list(bias.shape)} must have one entry per row of weight {list(weight.shape)}")


def check_targets(targets: torch.Tensor, vocab: int) -> None:
    """PactError unless targets are ids of the vocabulary: the kernels read logits at these places.

    Called by the custom ops, which run in compiled graphs as well. On CUDA it is an assertion on the device, so that
    nothing waits for it.
    """
    outside = (targets < 0) | (targets >= vocab)
    if targets.is_cuda:
        torch._assert_async(~outside.any(), "pact_fast: a target is outside the vocabulary")
    elif outside.any():
        place = int(outside.nonzero()[0])
        raise PactError(
            f"target {int(targets[place])} of token {place} is outside the vocabulary of {vocab} (rows of weight); "
            "leave out tokens without a loss instead of marking them with an id like -100"
        )


def per_token(temperature: float | torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The temperature of every token [N]. PactError if a tensor is given and has another shape."""
    if not isinstance(temperature, torch.Tensor):
        return torch.full(targets.shape, temperature, dtype=torch.float64, device=targets.device)
    if temperature.shape != targets.shape:
        raise PactError(
            f"temperature {list(temperature.shape)} must be a number or one entry per token [{len(targets)}]"
        )
    return temperature


def refuse_second_derivatives() -> None:
    """For backward passes: with create_graph=True, gradients without a graph would be silently wrong further on."""
    if torch.is_grad_enabled():
        raise PactError(
            "linear_logprob and pact_loss have no second derivatives; call backward without create_graph=True"
        )


def gradient_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The parameter's own; fp32 for fp16, whose small gradients only a loss scale saves, and that comes later."""
    return torch.float32 if parameter.dtype == torch.float16 else parameter.dtype


@torch.library.custom_op("pact_fast::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob, entropy) [N]."""
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
def _linear_logprob_backward(
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
    """Gradients of hidden, weight and bias; empty where `grads` says that none is wanted."""
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if grads[0] else hidden.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        wanted = grads[0], grads[1], grads[2]
        head = ChunkedHead(backend, hidden, weight, bias, softcap, len(hidden), wanted, entropy_grad=h is not None)
        for chunk in head.chunks():
            head.forward(hidden[chunk], targets[chunk], temperature[chunk])
            source, dx = head.backward(g[chunk], None if h is None else h[chunk])
            if dx is not None:
                d_hidden[chunk.start + source] = dx.to(hidden.dtype)
    d_weight, d_bias = head.weight_grads()
    return d_hidden, cast_gradient(d_weight, weight), cast_gradient(d_bias, bias if bias is not None else weight)


def cast_gradient(gradient: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
    """A gradient as an op gives it: cast once; an empty tensor for None."""
    if gradient is None:
        return parameter.new_empty(0, dtype=gradient_dtype(parameter))
    return gradient.to(gradient_dtype(parameter))


@_linear_logprob.register_fake
def _(hidden, weight, bias, targets, temperature, softcap, backend):
    logprob = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden, weight))
    return logprob, torch.empty_like(logprob)


@_linear_logprob_backward.register_fake
def _(g, h, hidden, weight, bias, targets, temperature, softcap, backend, grads):
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if grads[0] else hidden.new_empty(0)
    return d_hidden, *fake_weight_grads(weight, bias, grads)


def fake_weight_grads(weight: torch.Tensor, bias: torch.Tensor | None, grads: Sequence[bool]) -> list[torch.Tensor]:
    parameters = [weight, bias if bias is not None else weight]
    return [
        p.new_empty(p.shape if wanted else (0,), dtype=gradient_dtype(p))
        for p, wanted in zip(parameters, grads[1:], strict=True)
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
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _linear_logprob_backward(
        g, h, hidden, weight, bias, targets, temperature, ctx.softcap, ctx.backend, wanted
    )  # fmt: skip
    parameters = (hidden, weight, bias)
    given = [d.to(p.dtype) if want else None for d, p, want in zip(gradients, parameters, wanted, strict=True)]
    return *given, None, None, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup)
