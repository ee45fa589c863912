"""pact_loss: policy loss under two contexts, KL, entropy bonus and SFT over one loss table, in one pass over the logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pact_fast.components import LossContext
from pact_fast.errors import PactError
from pact_fast.kernels.head.checks import check_devices, check_head, check_table, check_temperature, per_token
from pact_fast.kernels.head.chunked import ChunkedHead
from pact_fast.kernels.head.divergence import DIVERGENCES, TokenPairs, make_pairing, pair_divergences
from pact_fast.kernels.head.gemm import accumulation_dtype, autocast_dtype
from pact_fast.kernels.head.hidden_grad import HiddenGradient
from pact_fast.kernels.head.logprob import (
    as_operands,
    cast_gradient,
    fake_weight_grads,
    fold_logit_scale,
    gradient_dtype,
    linear_logprob_op,
    refuse_second_derivatives,
)
from pact_fast.kernels.head.objective import (
    Clip,
    LossSettings,
    TokenTerms,
    bounds,
    make_policy_loss,
    old_logprob_of,
    sequence_mean,
    token_terms,
)
from pact_fast.kernels.head.stats import SUMS, token_stats
from pact_fast.kernels.head.tokens import COMPONENTS, LossTokens


@dataclass
class LossOutput:
    """Result of `pact_loss`.

    loss        scalar, fp32 (fp64 for fp64 input); differentiable once in hidden, weight and bias
    logprob     [N]  log-prob of each token, same dtype, detached
    entropy     [N]  entropy of each token's distribution in nats, same dtype, detached
    stats       {name: fp64 [contexts, components]}  sums, which add up over micro-batches; see `summarise`
    divergence  [M]  of each pair, unweighted and detached; None without pairs
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
    policy_loss: str = "ppo",
    clip: Clip = (0.2, 0.2),
    delta: float | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    is_cap: float | Mapping[LossContext, float] | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: torch.Tensor | None = None,
    pairs: TokenPairs | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Loss and gradients of N tokens under a linear head, without the [N, V] logits.

    Σ rl_weight·(w·policy + kl_coef·k3 − entropy_coef·H) − Σ sft_weight·log π, with the formulas of docs/loss.md
    (docs/method.md, section 2). Softmax, loss and gradients are computed in fp32 (fp64 for fp64 input), in the same
    pass that computes the logits; gradients are cast once, at the end. A token of weight 0 contributes exactly 0,
    whatever its ratio. Under autocast, hidden and weight are multiplied in its dtype; nothing else changes.

    Args:
        hidden: [T, D] hidden states; fp64, fp32, bf16 or fp16.
        weight: [V, D] weight of the head, `lm_head.weight`.
        tokens: The loss table, N rows on the device of `hidden`.
        policy_loss: "ppo", "cispo", "gspo", a name registered with `@policy_loss`, or `file.py:Class`. gspo takes one
            ratio per (sequence, context): all policy tokens of a sequence must be in the same call.
        clip: (low, high). The ratio's bounds are 1 − low and 1 + high; None leaves a side open.
        delta: Bound of the ratio where the advantage is negative (dual clip), more than 1 + high. ppo and gspo only.
        kl_coef: Coefficient of k3, the KL to the reference; needs `tokens.ref_logprob`.
        entropy_coef: Coefficient of the entropy bonus.
        is_cap: Policy terms are weighted by w = min(is_cap, exp(old − sampler)), stop-gradient; needs
            `tokens.sampler_logprob`. A mapping gives each context its cap; w = 1 for contexts left out. None: w = 1.
        temperature: Divides the logits; a number or [N].
        softcap: z = softcap·tanh(z/softcap), before the temperature; None: no cap.
        logit_scale: Positive factor of hWᵀ + b, before the soft-cap.
        bias: [V] bias of the head.
        pairs: Experimental: adds Σ pair weight·divergence of pairs of tokens, see `TokenPairs`.
        backend: "auto", or one of `backends()`.

    Raises:
        PactError: Settings contradict each other, columns do not fit or hold an id out of range, a temperature is not
            positive, the policy loss is unknown, or the backend does not support these tensors.
    """
    check_head(hidden, weight, bias)
    check_devices(tokens, hidden)
    caps = None if is_cap is None else _caps_by_context(is_cap)
    if pairs is not None:
        pairs.check()
    temperatures, cap = fold_logit_scale(logit_scale, per_token(temperature, tokens.target), softcap)
    loss, logprob, entropy, divergence, stats, *_ = pact_loss_op(
        hidden, weight, bias, *tokens.columns(), temperatures,
        *((None, None) if pairs is None else (pairs.index, pairs.weight)),
        policy_loss=policy_loss, clip_low=clip[0], clip_high=clip[1], delta=delta, kl_coef=kl_coef,
        entropy_coef=entropy_coef, is_cap=caps, softcap=cap,
        divergence=DIVERGENCES[0] if pairs is None else pairs.divergence,
        second_grad=pairs is not None and pairs.second_grad,
        backend=backend, operand_dtype=autocast_dtype(hidden, weight),
        grads=[t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)],
    )  # fmt: skip
    sums = dict(zip(SUMS, stats.detach().unbind(), strict=True))
    return LossOutput(loss, logprob.detach(), entropy.detach(), sums, None if pairs is None else divergence.detach())


def _caps_by_context(is_cap: float | Mapping[LossContext, float]) -> list[float]:
    """One cap per context; NaN: no importance weight."""
    if isinstance(is_cap, Mapping):
        return [float(is_cap.get(context, math.nan)) for context in LossContext]
    return [float(is_cap)] * len(LossContext)


@torch.library.custom_op("pact_fast::pact_loss", mutates_args=())
def pact_loss_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row: torch.Tensor,
    target: torch.Tensor,
    context: torch.Tensor,
    component: torch.Tensor,
    sequence: torch.Tensor | None,
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
    operand_dtype: torch.dtype | None,
    grads: Sequence[bool],
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """(loss, logprob [N], entropy [N], divergence [M], stats, d_hidden, d_weight, d_bias), in one pass over the logits.

    The last three are the gradients of the loss, empty where `grads` (hidden, weight, bias) is False. Everything that
    depends on values is checked here rather than in `pact_loss`, so that compiled graphs check it too.
    """
    tokens = LossTokens(
        row, target, context, component, sequence, advantage, old_logprob, rl_weight, sft_weight, ref_logprob, sampler_logprob
    )  # fmt: skip
    check_table(tokens, hidden, weight)
    check_temperature(temperature)
    rule = make_policy_loss(policy_loss)
    settings = LossSettings(rule, (clip_low, clip_high), delta, kl_coef, entropy_coef, is_cap, softcap)
    _check_settings(settings, policy_loss, tokens)
    pairs = None
    if pair_index is not None and pair_weight is not None:
        pairs = TokenPairs(pair_index, pair_weight, divergence, second_grad)  # type: ignore[arg-type]
        pairs.check_index(len(tokens))
    with torch.autocast(hidden.device.type, enabled=False):
        return evaluate(
            hidden, weight, bias, tokens, temperature, settings, pairs, backend, operand_dtype,
            (grads[0], grads[1], grads[2]),
        )  # fmt: skip


def _check_settings(settings: LossSettings, policy_loss: str, tokens: LossTokens) -> None:
    if settings.delta is not None:
        if not settings.rule.takes_delta:
            raise PactError(f"policy_loss='{policy_loss}' takes no delta (a bound of ppo and gspo); set delta=None")
        high = bounds(settings.clip)[1]
        if settings.delta <= high:
            raise PactError(f"delta={settings.delta} must be greater than 1 + clip[1] = {high}")
    if settings.kl_coef and tokens.ref_logprob is None:
        raise PactError("kl_coef needs tokens.ref_logprob; fill it with the reference's log-probs or set kl_coef=0")
    if settings.is_cap is not None and tokens.sampler_logprob is None:
        raise PactError("is_cap needs tokens.sampler_logprob; fill it with the sampler's log-probs or set is_cap=None")
    if settings.rule.sequence_ratio and tokens.sequence is None:
        raise PactError(
            f"policy_loss='{policy_loss}' needs an id per sequence, for one ratio each; fill tokens.sequence"
        )


def evaluate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: LossTokens,
    temperature: torch.Tensor,
    settings: LossSettings,
    pairs: TokenPairs | None,
    backend: str,
    operand_dtype: torch.dtype | None,
    grads: tuple[bool, bool, bool],
) -> Any:
    """The results of `pact_loss_op`: chunk by chunk, forward, loss terms, backward."""
    dtype, total = accumulation_dtype(hidden, weight), len(tokens)
    d_hidden = HiddenGradient(hidden.shape, tokens.row, dtype, gradient_dtype(hidden)) if grads[0] else None
    parameters = (hidden, weight, weight if bias is None else bias)
    hidden, weight = as_operands(operand_dtype, hidden, weight)
    sequence_ratio = None
    if settings.rule.sequence_ratio:
        sequence_ratio = _sequence_log_ratio(hidden, weight, bias, tokens, temperature, settings, backend)
    order = _processing_order(tokens, settings, pairs)
    head = ChunkedHead(
        backend, hidden, weight, bias, settings.softcap, total, grads, pairs is not None, bool(settings.entropy_coef)
    )  # fmt: skip
    chunk_values: list[tuple[torch.Tensor, ...]] = []
    chunk_terms: list[TokenTerms] = []
    for chunk in head.chunks():
        index = order[chunk]
        part = tokens.select(index)
        stats = head.forward(hidden.index_select(0, part.row), part.target, temperature[index])
        pairing = None if pairs is None else make_pairing(pairs, chunk, head)
        log_ratio = None if sequence_ratio is None else sequence_ratio[index]
        terms = token_terms(part, stats.logprob, stats.entropy, settings, log_ratio)
        chunk_values.append((stats.logprob, stats.entropy, pair_divergences(pairing, pairs, terms.g)))
        chunk_terms.append(terms)
        if any(grads):
            source, dx = head.backward(terms.g, terms.h if settings.entropy_coef else None, pairing)
            if d_hidden is not None and dx is not None:
                d_hidden.add(index[source], dx)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(total, device=order.device)
    logprob, entropy, divergence = (torch.cat(column)[inverse] for column in zip(*chunk_values, strict=True))
    terms = TokenTerms(*(torch.cat(column)[inverse] for column in zip(*chunk_terms, strict=True)))
    # summed in fp64: tens of thousands of terms of both signs
    loss = terms.rl.double().sum() + terms.sft.double().sum()
    by_pair = logprob.new_zeros(0)
    if pairs is not None:
        by_pair = divergence[pairs.index[:, 0]]
        loss = loss + (pairs.weight.double() * by_pair.double()).sum()
    d_weight, d_bias = head.weight_grads()
    return (
        loss.to(dtype), logprob, entropy, by_pair, token_stats(tokens, logprob, entropy, terms, divergence),
        cast_gradient(None if d_hidden is None else d_hidden.result(), parameters[0]),
        cast_gradient(d_weight, parameters[1]), cast_gradient(d_bias, parameters[2]),
    )  # fmt: skip


def _processing_order(tokens: LossTokens, settings: LossSettings, pairs: TokenPairs | None) -> torch.Tensor:
    """[N] permutation in which tokens are processed: pairs first, side by side; tokens without a gradient last.

    Active rows then fill whole chunks, so that their GEMMs are large and efficient.
    """
    inactive = (tokens.rl_weight == 0) & (tokens.sft_weight == 0)
    if not settings.kl_coef and not settings.entropy_coef:
        inactive |= (tokens.advantage == 0) & (tokens.sft_weight == 0)
    if pairs is None:
        return torch.argsort(inactive, stable=True)
    order = pairs.order(len(tokens))
    paired = pairs.index.numel()
    unpaired = order[paired:]
    return torch.cat([order[:paired], unpaired[torch.argsort(inactive[unpaired], stable=True)]])


def _sequence_log_ratio(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: LossTokens,
    temperature: torch.Tensor,
    settings: LossSettings,
    backend: str,
) -> torch.Tensor:
    """[N] mean log-ratio over the policy tokens of each (sequence, context), from a separate forward pass; else 0."""
    policy = tokens.rl_weight != 0  # the other tokens enter no ratio
    logprob, _ = linear_logprob_op(
        hidden[tokens.row[policy]], weight, bias, tokens.target[policy], temperature[policy], settings.softcap, backend
    )  # fmt: skip
    log_ratio = logprob - old_logprob_of(tokens.select(policy), logprob)
    assert tokens.sequence is not None
    group = tokens.sequence * len(LossContext) + tokens.context
    mean = logprob.new_zeros(len(tokens))
    mean[policy] = sequence_mean(log_ratio, group[policy])
    return mean


@pact_loss_op.register_fake
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


def save_gradients(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    """Of an op whose last three outputs are the gradients of its first three inputs."""
    ctx.save_for_backward(*output[-3:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.grads, ctx.inputs = keyword_only_inputs["grads"], len(inputs)
    ctx.set_materialize_grads(False)


def scaled_gradients(
    ctx: Any, upstream: torch.Tensor | None, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Scales the gradients that the forward pass formed; only the loss is differentiable."""
    refuse_second_derivatives()
    input_grads: list[torch.Tensor | None] = [None] * ctx.inputs
    if upstream is not None:
        for i, gradient in enumerate(ctx.saved_tensors):
            if ctx.grads[i]:
                input_grads[i] = _scaled(gradient, upstream).to(ctx.dtypes[i])
    return tuple(input_grads)


def _scaled(gradient: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """gradient·upstream, in place if no later backward pass needs the gradient."""
    if upstream.device.type == "cpu" and type(upstream) is torch.Tensor and upstream == 1.0:
        return gradient
    traced = type(gradient) is not torch.Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    return gradient.detach().mul_(upstream)


pact_loss_op.register_autograd(scaled_gradients, setup_context=save_gradients)
