"""The dual loss reduction: policy loss under two contexts and SFT, in one pass over the logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pact_fast.components import LossContext
from pact_fast.errors import PactError
from pact_fast.kernels.head import objective
from pact_fast.kernels.head.chunked import ChunkedHead
from pact_fast.kernels.head.divergence import DIVERGENCES, TokenPairs, pair_values, pairing
from pact_fast.kernels.head.gemm import accumulation_dtype
from pact_fast.kernels.head.logprob import (
    _linear_logprob,
    cast_gradient,
    check_head,
    check_targets,
    fake_weight_grads,
    gradient_dtype,
    per_token,
    refuse_second_derivatives,
)
from pact_fast.kernels.head.objective import Settings, TokenTerms, old_logprob_of, token_terms
from pact_fast.kernels.head.stats import SUMS, token_stats
from pact_fast.kernels.head.tokens import COMPONENTS, LossTokens

POLICY_LOSSES = ("ppo", "cispo", "gspo")


@dataclass
class LossOutput:
    """loss: scalar, differentiable once in hidden, weight and bias. logprob, entropy: [N], detached.

    stats: sums per context and component, see `pact_fast.kernels.head.stats`; those of micro-batches add up.
    divergence: [M], of each pair, unweighted and detached; None without pairs.
    """

    loss: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor
    stats: dict[str, torch.Tensor]
    divergence: torch.Tensor | None = None


def pact_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: LossTokens,
    *,
    policy_loss: Literal["ppo", "cispo", "gspo"] = "ppo",
    clip: objective.Clip = (0.2, 0.2),
    delta: float | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    is_cap: float | Mapping[LossContext, float] | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    pairs: TokenPairs | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Σ rl_weight·(w·policy + kl_coef·k3 − entropy_coef·H) − Σ sft_weight·log π over the N tokens (method, section 2).

    hidden [T, D], weight [V, D] and bias [V] in fp64, fp32, bf16 or fp16; the logits are those of `linear_logprob`,
    temperature a number or [N]. Softmax, loss and gradients are formed in fp32 (fp64 for fp64 input) in the pass that
    makes the logits; gradients are cast once, at the end. Formulas and statistics: docs/loss.md.

    clip      (low, high): the ratio's bounds are 1 − low and 1 + high; None leaves a side open
    delta     ppo, gspo: bound of the ratio where A < 0 (dual clip), more than 1 + high
    is_cap    policy terms are weighted by w = min(is_cap, exp(old − sampler)), without gradient; None: w = 1.
              {context: cap} for different caps; contexts left out have w = 1
    gspo      one ratio per (sequence, context): all policy tokens of a sequence must be in the same call
    pairs     adds Σ pair weight·divergence between the next-token distributions of two tokens, see `TokenPairs`

    A token of weight 0 contributes exactly 0, whatever its ratio. Raises PactError for settings that contradict each
    other, for shapes that do not fit, for a target that is no token id, and for a back-end that cannot serve.
    """
    check_head(hidden, weight, bias)
    caps = None if is_cap is None else _caps(is_cap)
    settings = Settings(policy_loss, clip, delta, kl_coef, entropy_coef, caps, softcap)
    _check(settings, tokens)
    if pairs is not None:
        pairs.check()
    loss, logprob, entropy, divergence, stats, *_ = _pact_loss(
        hidden, weight, bias, *tokens.columns(), per_token(temperature, tokens.target),
        *((None, None) if pairs is None else (pairs.index, pairs.weight)),
        policy_loss=policy_loss, clip_low=clip[0], clip_high=clip[1], delta=delta, kl_coef=kl_coef,
        entropy_coef=entropy_coef, is_cap=caps, softcap=softcap,
        divergence=DIVERGENCES[0] if pairs is None else pairs.divergence,
        second_grad=pairs is not None and pairs.second_grad,
        backend=backend,
        grads=[t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)],
    )  # fmt: skip
    sums = dict(zip(SUMS, stats.detach().unbind(), strict=True))
    return LossOutput(loss, logprob.detach(), entropy.detach(), sums, None if pairs is None else divergence.detach())


def _caps(is_cap: float | Mapping[LossContext, float]) -> list[float]:
    """One cap per context; NaN: no weights."""
    if isinstance(is_cap, Mapping):
        return [float(is_cap.get(context, math.nan)) for context in LossContext]
    return [float(is_cap)] * len(LossContext)


@torch.library.custom_op("pact_fast::pact_loss", mutates_args=())
def _pact_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row: torch.Tensor,
    target: torch.Tensor,
    context: torch.Tensor,
    component: torch.Tensor,
    sequence: torch.Tensor,
    advantage: torch.Tensor,
    old_logprob: torch.Tensor,
    rl_weight: torch.Tensor,
    sft_weight: torch.Tensor,
    ref_logprob: torch.Tensor | None,
    sampler_logprob: torch.Tensor | None,
    temperature: torch.Tensor,
    pair_index: torch.Tensor | None,
    pair_weight: torch.Tensor | None,
    *,
    policy_loss: str,
    clip_low: float | None,
    clip_high: float | None,
    delta: float | None,
    kl_coef: float,
    entropy_coef: float,
    is_cap: Sequence[float] | None,
    softcap: float | None,
    divergence: str,
    second_grad: bool,
    backend: str,
    grads: Sequence[bool],
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """(loss, logprob [N], entropy [N], divergence [M], stats, d_hidden, d_weight, d_bias): one pass over the logits.

    Gradients are those of the loss; empty tensors where `grads` says that none is wanted.
    """
    tokens = LossTokens(
        row, target, context, component, sequence, advantage, old_logprob, rl_weight, sft_weight, ref_logprob, sampler_logprob
    )  # fmt: skip
    settings = Settings(policy_loss, (clip_low, clip_high), delta, kl_coef, entropy_coef, is_cap, softcap)
    pairs = None
    if pair_index is not None and pair_weight is not None:
        pairs = TokenPairs(pair_index, pair_weight, divergence, second_grad)  # type: ignore[arg-type]
        pairs.check_index(len(tokens))
    check_targets(target, len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        return _evaluate(
            hidden, weight, bias, tokens, temperature, settings, pairs, backend, (grads[0], grads[1], grads[2])
        )  # fmt: skip


def _evaluate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: LossTokens,
    temperature: torch.Tensor,
    settings: Settings,
    pairs: TokenPairs | None,
    backend: str,
    grads: tuple[bool, bool, bool],
) -> Any:
    """What `_pact_loss` gives."""
    dtype, total = accumulation_dtype(hidden, weight), len(tokens)
    clip_log = None
    if settings.policy_loss == "gspo":
        clip_log = _sequence_log_ratio(hidden, weight, bias, tokens, temperature, settings, backend)
    order = _order(tokens, settings, pairs)
    head = ChunkedHead(
        backend, hidden, weight, bias, settings.softcap, total, grads, pairs is not None, bool(settings.entropy_coef)
    )  # fmt: skip
    d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if grads[0] else None
    values: list[tuple[torch.Tensor, ...]] = []
    parts: list[TokenTerms] = []
    for chunk in head.chunks():
        here = order[chunk]
        part = tokens.select(here)
        stats = head.forward(hidden.index_select(0, part.row), part.target, temperature[here])
        coupled = None if pairs is None else pairing(pairs, chunk, head)
        terms = token_terms(part, stats.logprob, stats.entropy, settings, None if clip_log is None else clip_log[here])
        values.append((stats.logprob, stats.entropy, pair_values(coupled, pairs, terms.g)))
        parts.append(terms)
        if any(grads):
            source, dx = head.backward(terms.g, terms.h if settings.entropy_coef else None, coupled)
            if d_hidden is not None and dx is not None:
                _add_rows(d_hidden, part.row[source], dx)
    back = torch.empty_like(order)
    back[order] = torch.arange(total, device=order.device)
    logprob, entropy, divergence = (torch.cat(column)[back] for column in zip(*values, strict=True))
    terms = TokenTerms(*(torch.cat(column)[back] for column in zip(*parts, strict=True)))
    # summed in fp64: tens of thousands of terms of both signs
    loss = terms.rl.double().sum() + terms.sft.double().sum()
    of_pairs = logprob.new_zeros(0)
    if pairs is not None:
        of_pairs = divergence[pairs.index[:, 0]]
        loss = loss + (pairs.weight.double() * of_pairs.double()).sum()
    d_weight, d_bias = head.weight_grads()
    return (
        loss.to(dtype), logprob, entropy, of_pairs, token_stats(tokens, logprob, entropy, terms, divergence),
        cast_gradient(d_hidden, hidden), cast_gradient(d_weight, weight),
        cast_gradient(d_bias, weight if bias is None else bias),
    )  # fmt: skip


def _order(tokens: LossTokens, settings: Settings, pairs: TokenPairs | None) -> torch.Tensor:
    """[N] tokens in the order in which the pass takes them.

    Those of a pair lie next to each other. Tokens that cannot have a gradient come last, so that the others fill whole
    chunks: small products are slow ones.
    """
    silent = (tokens.rl_weight == 0) & (tokens.sft_weight == 0)
    if not settings.kl_coef and not settings.entropy_coef:
        silent |= (tokens.advantage == 0) & (tokens.sft_weight == 0)
    if pairs is None:
        return torch.argsort(silent, stable=True)
    order = pairs.order(len(tokens))
    coupled = pairs.index.numel()
    rest = order[coupled:]
    return torch.cat([order[:coupled], rest[torch.argsort(silent[rest], stable=True)]])


def _add_rows(total: torch.Tensor, row: torch.Tensor, values: torch.Tensor) -> None:
    """total[row] += values, rows may repeat; in a fixed order."""
    if total.is_cuda:
        total.index_put_((row,), values, accumulate=True)  # sorts; index_add_ would race there
    else:
        total.index_add_(0, row, values)


def _sequence_log_ratio(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: LossTokens,
    temperature: torch.Tensor,
    settings: Settings,
    backend: str,
) -> torch.Tensor:
    """gspo: mean log-ratio of the policy tokens of each (sequence, context) [N], from a forward pass of its own."""
    live = tokens.rl_weight != 0
    # SFT and masked tokens have no share in any ratio
    logprob, _ = _linear_logprob(
        hidden[tokens.row[live]], weight, bias, tokens.target[live], temperature[live], settings.softcap, backend
    )  # fmt: skip
    log_ratio = logprob - old_logprob_of(tokens.select(live), logprob)
    group = tokens.sequence * len(LossContext) + tokens.context
    mean = logprob.new_zeros(len(tokens))
    mean[live] = objective.sequence_mean(log_ratio, group[live])
    return mean


def _check(settings: Settings, tokens: LossTokens) -> None:
    if settings.policy_loss not in POLICY_LOSSES:
        raise PactError(f"policy_loss='{settings.policy_loss}' is not known; use one of {', '.join(POLICY_LOSSES)}")
    if settings.delta is not None and settings.policy_loss == "cispo":
        raise PactError("delta is a bound of ppo and gspo; leave it out with policy_loss='cispo'")
    if settings.delta is not None and settings.delta <= objective.bounds(settings.clip)[1]:
        raise PactError(
            f"delta={settings.delta} must be greater than 1 + clip[1] = {objective.bounds(settings.clip)[1]}"
        )
    if settings.kl_coef and tokens.ref_logprob is None:
        raise PactError("kl_coef needs tokens.ref_logprob; fill it with the reference's log-probs or set kl_coef=0")
    if settings.is_cap is not None and tokens.sampler_logprob is None:
        raise PactError("is_cap needs tokens.sampler_logprob; fill it with the sampler's log-probs or set is_cap=None")


@_pact_loss.register_fake
def _(hidden, weight, bias, row, *columns, grads, **settings):
    total, pair_index = len(row), columns[-2]
    logprob = hidden.new_empty(total, dtype=accumulation_dtype(hidden, weight))
    d_hidden = hidden.new_empty(hidden.shape if grads[0] else (0,), dtype=gradient_dtype(hidden))
    return (
        logprob.new_empty(()), logprob, torch.empty_like(logprob),
        logprob.new_empty(0 if pair_index is None else len(pair_index)),
        logprob.new_empty((len(SUMS), len(LossContext), COMPONENTS), dtype=torch.float64),
        d_hidden, *fake_weight_grads(weight, bias, grads),
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    ctx.save_for_backward(*output[-3:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.wanted, ctx.inputs = keyword_only_inputs["grads"], len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The gradients are known already and only scaled; the loss alone has one."""
    refuse_second_derivatives()
    given: list[torch.Tensor | None] = [None] * ctx.inputs
    if upstream is not None:
        for i, gradient in enumerate(ctx.saved_tensors):
            if ctx.wanted[i]:
                given[i] = _scaled(gradient, upstream).to(ctx.dtypes[i])
    return tuple(given)


def _scaled(gradient: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """gradient·upstream, in the gradient's own memory if this backward pass is the last one that needs it."""
    if upstream.device.type == "cpu" and type(upstream) is torch.Tensor and upstream == 1.0:
        return gradient
    traced = type(gradient) is not torch.Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    return gradient.detach().mul_(upstream)


_pact_loss.register_autograd(_backward, setup_context=_setup)
