"""pact_loss: policy loss under two contexts, KL, entropy bonus and SFT over one loss table, in one pass over the logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pact_fast.components import LossContext
from pact_fast.errors import PactError
from pact_fast.kernels.head.checks import check_devices, check_head, check_table, check_temperature, per_token
from pact_fast.kernels.head.divergence import DIVERGENCES, TokenPairs
from pact_fast.kernels.head.gemm import accumulation_dtype, autocast_dtype
from pact_fast.kernels.head.logprob import (
    fake_weight_grads,
    fold_logit_scale,
    gradient_dtype,
    refuse_second_derivatives,
)
from pact_fast.kernels.head.loss_pass import evaluate
from pact_fast.kernels.head.objective import (
    Clip,
    LossSettings,
    SftLoss,
    TokenLoss,
    bounds,
    make_policy_loss,
)
from pact_fast.kernels.head.row_statistics import by_name, check_statistics, split_names
from pact_fast.kernels.head.stats import SUMS
from pact_fast.kernels.head.tokens import COMPONENTS, LossTokens


@dataclass
class LossOutput:
    """Result of `pact_loss`.

    loss        scalar, fp32 (fp64 for fp64 input); differentiable once in hidden, weight and bias
    logprob     [N]  log-prob of each token, same dtype, detached
    entropy     [N]  entropy of each token's distribution in nats, same dtype, detached
    stats       {name: fp64 [contexts, components]}  sums, which add up over micro-batches; see `summarise`
    divergence  [M]  of each pair, unweighted and detached; None without pairs
    row_statistics  {name: [N]}  the `statistics` asked for, detached
    """

    loss: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor
    stats: dict[str, torch.Tensor]
    divergence: torch.Tensor | None = None
    row_statistics: dict[str, torch.Tensor] = field(default_factory=dict)


def pact_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: LossTokens,
    *,
    policy_loss: str | TokenLoss = "ppo",
    sft_loss: SftLoss | None = None,
    clip: Clip = (0.2, 0.2),
    delta: float | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    importance_cap: float | Mapping[LossContext, float] | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: torch.Tensor | None = None,
    pairs: TokenPairs | None = None,
    statistics: Sequence[str] = (),
    backend: str = "auto",
) -> LossOutput:
    """Loss and gradients of N tokens under a linear head, without the [N, V] logits.

    Σ rl_weight·(w·policy + kl_coef·k3 − entropy_coef·H) + Σ sft_weight·sft, sft = −log π, with the formulas of docs/loss.md
    (docs/method.md, section 2). Softmax, loss and gradients are computed in fp32 (fp64 for fp64 input), in the same
    pass that computes the logits; gradients are cast once, at the end. A token of weight 0 contributes exactly 0,
    whatever its ratio. Under autocast, hidden and weight are multiplied in its dtype; nothing else changes.

    Args:
        hidden: [T, D] hidden states; fp64, fp32, bf16 or fp16.
        weight: [V, D] weight of the head, `lm_head.weight`.
        tokens: The loss table, N rows on the device of `hidden`.
        policy_loss: "ppo", "cispo", "gspo", "gspo_sequence", a name registered with `@policy_loss`, `file.py:Class`, or a
            function. gspo and gspo_sequence take one ratio per (sequence, context): all policy tokens of a sequence must
            be in the same call. A function (logprob [n], entropy [n], index [n]) → loss [n] is called for every chunk, with
            the places of its tokens in the table, and differentiated by autograd; it sees neither advantage nor clip.
        sft_loss: None: −log π. Or a function log π [n] → loss [n] of expert tokens, differentiated by autograd chunk by chunk,
            such as `token_losses.phi_weighted`.
        clip: (low, high). The ratio's bounds are 1 − low and 1 + high; None leaves a side open.
        delta: Bound of the ratio where the advantage is negative (dual clip), more than 1 + high. ppo and gspo only.
        kl_coef: Coefficient of k3, the KL to the reference; needs `tokens.ref_logprob`.
        entropy_coef: Coefficient of the entropy bonus.
        importance_cap: Policy terms are weighted by w = min(importance_cap, exp(old − sampler)), stop-gradient; needs
            `tokens.sampler_logprob`. A mapping gives each context its cap; w = 1 for contexts left out. None: w = 1.
        temperature: Divides the logits; a number or [N].
        softcap: z = softcap·tanh(z/softcap), before the temperature; None: no cap.
        logit_scale: Positive factor of hWᵀ + b, before the soft-cap.
        bias: [V] bias of the head.
        pairs: Experimental: adds Σ pair weight·divergence of pairs of tokens, see `TokenPairs`.
        statistics: Names of further statistics to return per token, see `linear_logprob`.
        backend: "auto", or one of `backends()`.

    Raises:
        PactError: Settings contradict each other, columns do not fit or hold an id out of range, a temperature is not
            positive, the policy loss is unknown, or the backend does not support these tensors.
    """
    check_head(hidden, weight, bias)
    check_devices(tokens, hidden)
    caps = None if importance_cap is None else _caps_by_context(importance_cap)
    if pairs is not None:
        pairs.check()
    temperatures, cap = fold_logit_scale(logit_scale, per_token(temperature, tokens.target), softcap)
    names = check_statistics(statistics)
    settings: dict[str, Any] = dict(
        policy_loss=policy_loss, clip_low=clip[0], clip_high=clip[1], delta=delta, kl_coef=kl_coef,
        entropy_coef=entropy_coef, importance_cap=caps, softcap=cap,
        divergence=DIVERGENCES[0] if pairs is None else pairs.divergence,
        second_grad=pairs is not None and pairs.second_grad,
        backend=backend, operand_dtype=autocast_dtype(hidden, weight),
        grads=[t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)],
        statistics=names,
    )  # fmt: skip
    columns = *tokens.columns(), temperatures, *((None, None) if pairs is None else (pairs.index, pairs.weight))
    if isinstance(policy_loss, str) and sft_loss is None:
        outputs = pact_loss_op(hidden, weight, bias, *columns, **settings)
    else:  # an operator cannot take a function
        outputs = _LossOfFunction.apply(hidden, weight, bias, columns, {**settings, "sft_loss": sft_loss})
    loss, logprob, entropy, divergence, sums, values = outputs[:6]
    return LossOutput(
        loss, logprob.detach(), entropy.detach(), dict(zip(SUMS, sums.detach().unbind(), strict=True)),
        None if pairs is None else divergence.detach(), by_name(names, values),
    )  # fmt: skip


def _caps_by_context(importance_cap: float | Mapping[LossContext, float]) -> list[float]:
    """One cap per context; NaN: no importance weight."""
    if isinstance(importance_cap, Mapping):
        return [float(importance_cap.get(context, math.nan)) for context in LossContext]
    return [float(importance_cap)] * len(LossContext)


def run_pact_loss(
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
    kl_weight: torch.Tensor | None,
    entropy_weight: torch.Tensor | None,
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
    importance_cap: Sequence[float] | None,
    softcap: float | None,
    divergence: str,
    second_grad: bool,
    backend: str,
    operand_dtype: torch.dtype | None,
    grads: Sequence[bool],
    statistics: str = "",
    sft_loss: str | None = None,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor,
]:  # fmt: skip
    """(loss, logprob [N], entropy [N], divergence [M], stats, row statistics [K, N], d_hidden, d_weight, d_bias), in one
    pass over the logits.

    The last three are the gradients of the loss, empty where `grads` (hidden, weight, bias) is False. Everything that
    depends on values is checked here rather than in `pact_loss`, so that compiled graphs check it too. `policy_loss` and
    `sft_loss` are functions where this is called past the operator, whose schema has no type for them.
    """
    tokens = LossTokens(
        row, target, context, component, sequence, advantage, old_logprob, rl_weight, sft_weight, ref_logprob,
        sampler_logprob, kl_weight, entropy_weight,
    )  # fmt: skip
    check_table(tokens, hidden, weight)
    check_temperature(temperature)
    rule = make_policy_loss(policy_loss)
    clip = (clip_low, clip_high)
    settings = LossSettings(rule, clip, delta, kl_coef, entropy_coef, importance_cap, softcap, sft_loss)  # type: ignore[arg-type]
    _check_settings(settings, policy_loss if isinstance(policy_loss, str) else "a function", tokens)
    pairs = None
    if pair_index is not None and pair_weight is not None:
        pairs = TokenPairs(pair_index, pair_weight, divergence, second_grad)  # type: ignore[arg-type]
        pairs.check_index(len(tokens))
    with torch.autocast(hidden.device.type, enabled=False):
        return evaluate(
            hidden, weight, bias, tokens, temperature, settings, pairs, backend, operand_dtype,
            (grads[0], grads[1], grads[2]), split_names(statistics),
        )  # fmt: skip


pact_loss_op = torch.library.custom_op("pact_fast::pact_loss", run_pact_loss, mutates_args=())


class _LossOfFunction(torch.autograd.Function):
    """`pact_loss_op` with a function as its policy loss or SFT loss."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, columns, settings):
        output = run_pact_loss(hidden, weight, bias, *columns, **settings)
        ctx.mark_non_differentiable(*output[1:])
        save_gradients(ctx, (hidden, weight, bias, columns, settings), settings, output)
        return output

    @staticmethod
    def backward(ctx: Any, upstream, *_):
        return scaled_gradients(ctx, upstream)


def _check_settings(settings: LossSettings, policy_loss: str, tokens: LossTokens) -> None:
    if settings.delta is not None:
        if not settings.rule.takes_delta:
            raise PactError(f"policy_loss='{policy_loss}' takes no delta (a bound of ppo and gspo); set delta=None")
        high = bounds(settings.clip)[1]
        if settings.delta <= high:
            raise PactError(f"delta={settings.delta} must be greater than 1 + clip[1] = {high}")
    if settings.kl_coef and tokens.ref_logprob is None:
        raise PactError("kl_coef needs tokens.ref_logprob; fill it with the reference's log-probs or set kl_coef=0")
    if settings.importance_cap is not None and tokens.sampler_logprob is None:
        raise PactError(
            "importance_cap needs tokens.sampler_logprob; fill it with the sampler's log-probs or set importance_cap=None"
        )
    if settings.rule.sequence_ratio and tokens.sequence is None:
        raise PactError(
            f"policy_loss='{policy_loss}' needs an id per sequence, for one ratio each; fill tokens.sequence"
        )


@pact_loss_op.register_fake
def _(hidden, weight, bias, row, *columns, grads, **settings):
    total, pair_index = len(row), columns[-2]
    logprob = hidden.new_empty(total, dtype=accumulation_dtype(hidden, weight))
    d_hidden = hidden.new_empty(hidden.shape if grads[0] else (0,), dtype=gradient_dtype(hidden))
    return (
        logprob.new_empty(()), logprob, torch.empty_like(logprob),
        logprob.new_empty(0 if pair_index is None else len(pair_index)),
        logprob.new_empty((len(SUMS), len(LossContext), COMPONENTS), dtype=torch.float64),
        logprob.new_empty(len(split_names(settings.get("statistics", ""))), total),
        d_hidden, *fake_weight_grads(weight, bias, grads),
    )  # fmt: skip


def save_gradients(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    """Save the gradients that an op returned for backward: its last three outputs, of its first three inputs."""
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
