"""Log-prob and entropy of given tokens under a linear head, without the [N, V] logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pact_fast.errors import PactError
from pact_fast.kernels.backend import require_backend
from pact_fast.kernels.head import ChunkedHead, accumulation_dtype


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
    PactError when shapes do not fit or the back-end is not live.
    """
    require_backend(backend)
    check_head(hidden, weight, bias)
    if targets.shape != hidden.shape[:1]:
        raise PactError(
            f"linear_logprob: targets {list(targets.shape)} must be one token id per row of hidden {list(hidden.shape)}"
        )
    check_temperature(temperature, len(targets))
    logprob, entropies = _LinearLogprob.apply(hidden, weight, bias, targets, temperature, softcap, entropy)
    return LogProbs(logprob, entropies)


def check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """hidden [·, D], weight [V, D], bias [V] or None; PactError otherwise."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise PactError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, D] and [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PactError(f"bias {list(bias.shape)} must have one entry per row of weight {list(weight.shape)}")


def check_temperature(temperature: float | torch.Tensor, count: int) -> None:
    if isinstance(temperature, torch.Tensor) and temperature.shape != (count,):
        raise PactError(f"temperature {list(temperature.shape)} must be a number or one entry per token [{count}]")


def at(temperature: float | torch.Tensor, chunk: slice, dtype: torch.dtype) -> float | torch.Tensor:
    """The temperature of a chunk of tokens."""
    return temperature[chunk].to(dtype) if isinstance(temperature, torch.Tensor) else temperature


def refuse_second_derivatives() -> None:
    """For backward passes: with create_graph=True, gradients without a graph would be silently wrong further on."""
    if torch.is_grad_enabled():
        raise PactError(
            "linear_logprob and pact_loss have no second derivatives; call backward without create_graph=True"
        )


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float | torch.Tensor,
        softcap: float | None,
        entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        per_row = temperature if isinstance(temperature, torch.Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, targets, per_row)
        ctx.temperature, ctx.softcap = None if per_row is not None else temperature, softcap
        ctx.set_materialize_grads(False)
        dtype, total = accumulation_dtype(hidden), len(hidden)
        logprob = torch.empty(total, dtype=dtype, device=hidden.device)
        entropies = torch.empty_like(logprob) if entropy else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, bias, softcap, total)
            for chunk in head.chunks():
                logprob[chunk] = head.forward(hidden[chunk].to(dtype), targets[chunk], at(temperature, chunk, dtype))
                if entropies is not None:
                    entropies[chunk] = head.entropy()
        return logprob, entropies

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None, h: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivatives()
        hidden, weight, bias, targets, per_row = ctx.saved_tensors
        temperature = ctx.temperature if per_row is None else per_row
        dtype, total = accumulation_dtype(hidden), len(hidden)
        if g is None:
            g = torch.zeros(total, dtype=dtype, device=hidden.device)
        grads = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if grads[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, bias, ctx.softcap, total, grads)
            for chunk in head.chunks():
                head.forward(hidden[chunk].to(dtype), targets[chunk], at(temperature, chunk, dtype))
                active, dx = head.backward(g[chunk], None if h is None else h[chunk])
                if d_hidden is not None and dx is not None:
                    d_hidden[chunk.start + active] = dx.to(hidden.dtype)
        d_weight = None if head.d_weight is None else head.d_weight.to(weight.dtype)
        d_bias = None if head.d_bias is None else head.d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None
