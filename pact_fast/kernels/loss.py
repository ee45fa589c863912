"""The dual loss reduction: policy loss under two contexts and SFT, in one pass over the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from pact_fast.errors import PactError
from pact_fast.kernels import policy
from pact_fast.kernels.backend import require_backend
from pact_fast.kernels.head import ChunkedHead, accumulation_dtype
from pact_fast.kernels.logprob import at, check_head, check_temperature, linear_logprob, refuse_second_derivatives
from pact_fast.kernels.stats import token_stats
from pact_fast.kernels.tokens import LossTokens, Stream

POLICY_LOSSES = ("ppo", "cispo", "gspo")


@dataclass
class LossOutput:
    """loss: scalar, differentiable once in hidden, weight and bias. logprob, entropy: [N], detached.

    stats: sums per stream and component, see `pact_fast.kernels.stats`; those of micro-batches add up.
    """

    loss: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor
    stats: dict[str, torch.Tensor]


def pact_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: LossTokens,
    *,
    policy_loss: Literal["ppo", "cispo", "gspo"] = "ppo",
    clip: policy.Clip = (0.2, 0.2),
    delta: float | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    is_cap: float | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Σ rl_weight·(w·policy + kl_coef·k3 − entropy_coef·H) − Σ sft_weight·log π over the N tokens (method, section 2).

    hidden [T, D], weight [V, D] and bias [V] in fp64, fp32, bf16 or fp16; the logits are those of `linear_logprob`,
    temperature a number or [N]. Softmax, loss and gradients are formed in fp32 (fp64 for fp64 input) in the pass that
    makes the logits; gradients are cast once, at the end. Formulas and statistics: docs/loss.md.

    clip      (low, high): the ratio's bounds are 1 − low and 1 + high; None leaves a side open
    delta     ppo, gspo: bound of the ratio where A < 0 (dual clip), more than 1 + high
    is_cap    policy terms are weighted by w = min(is_cap, exp(old − sampler)), without gradient; None: w = 1
    gspo      one ratio per (sequence, stream): all policy tokens of a sequence must be in the same call

    A token of weight 0 contributes exactly 0, whatever its ratio. Raises PactError for settings that contradict each
    other, for shapes that do not fit, and for a back-end that is not live.
    """
    require_backend(backend)
    check_head(hidden, weight, bias)
    check_temperature(temperature, len(tokens))
    settings = Settings(policy_loss, clip, delta, kl_coef, entropy_coef, is_cap, temperature, softcap)
    _check(settings, tokens)
    grads = (_needs_grad(hidden), _needs_grad(weight), _needs_grad(bias))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        loss, logprob, entropy, stats, gradients = _evaluate(hidden, weight, bias, tokens, settings, grads)
    if any(grads):
        loss = _Attach.apply(loss, gradients, hidden, weight, bias)
    return LossOutput(loss, logprob, entropy, stats)


def _needs_grad(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


class Settings(NamedTuple):
    policy_loss: str
    clip: policy.Clip
    delta: float | None
    kl_coef: float
    entropy_coef: float
    is_cap: float | None
    temperature: float | torch.Tensor
    softcap: float | None


class TokenTerms(NamedTuple):
    """Everything about a chunk of tokens that follows from its log-probs and entropies; [n] each.

    g and h are dL/dlogprob and dL/dentropy.
    """

    rl: torch.Tensor
    sft: torch.Tensor
    g: torch.Tensor
    h: torch.Tensor
    k3: torch.Tensor
    log_ratio: torch.Tensor
    clip_log: torch.Tensor
    weight: torch.Tensor
    old: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def token_terms(
    tokens: LossTokens, logprob: torch.Tensor, entropy: torch.Tensor, settings: Settings, clip_log: torch.Tensor | None
) -> TokenTerms:
    """The loss of every token and its derivatives. `clip_log` [n]: gspo's sequence log-ratios; None: the tokens'."""
    dtype = logprob.dtype
    rl_weight, sft_weight, advantage = (t.to(dtype) for t in (tokens.rl_weight, tokens.sft_weight, tokens.advantage))
    old = _old_logprob(tokens, logprob)
    log_ratio = logprob - old
    if clip_log is None:
        clip_log = log_ratio
    # an advantage of 0 makes the term 0 even where the ratio overflows
    rule_log = torch.where(advantage == 0, 0.0, clip_log)
    if settings.policy_loss == "cispo":
        term = policy.cispo(rule_log, advantage, logprob, settings.clip)
    else:
        term = policy.ppo(rule_log, advantage, settings.clip, settings.delta)
    weight = torch.ones_like(logprob)
    if settings.is_cap is not None and tokens.sampler_logprob is not None:
        weight = policy.importance_weight(old, tokens.sampler_logprob.to(dtype), settings.is_cap)
    reference = torch.full_like(logprob, torch.nan) if tokens.ref_logprob is None else tokens.ref_logprob.to(dtype)
    k3, k3_slope = policy.k3(reference, logprob)
    live = rl_weight != 0
    value = weight * term.value + settings.kl_coef * k3 - settings.entropy_coef * entropy
    slope = weight * term.slope + settings.kl_coef * k3_slope
    # where, not a product: 0 · inf is NaN
    rl = torch.where(live, rl_weight * value, 0.0)
    g = torch.where(live, rl_weight * slope, 0.0) - sft_weight
    return TokenTerms(
        rl=rl,
        sft=torch.where(sft_weight != 0, -sft_weight * logprob, 0.0),
        g=g,
        h=-settings.entropy_coef * rl_weight,
        k3=k3,
        log_ratio=log_ratio,
        clip_log=clip_log,
        weight=weight,
        old=old,
        clipped_low=term.clipped_low,
        clipped_high=term.clipped_high,
    )


def _old_logprob(tokens: LossTokens, logprob: torch.Tensor) -> torch.Tensor:
    """log π_old [n]; where it is NaN, the current one, which makes the ratio exactly 1."""
    return torch.where(tokens.old_logprob.isnan(), logprob, tokens.old_logprob.to(logprob.dtype))


Gradients = list[torch.Tensor | None]


def _evaluate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: LossTokens,
    settings: Settings,
    grads: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor], Gradients]:
    """(loss, logprob, entropy, stats, gradients of hidden, weight and bias), one pass over the logits (gspo: two)."""
    dtype, total = accumulation_dtype(hidden), len(tokens)
    logprob = torch.empty(total, dtype=dtype, device=hidden.device)
    entropy = torch.empty_like(logprob)
    sequence_log = (
        _sequence_log_ratio(hidden, weight, bias, tokens, settings) if settings.policy_loss == "gspo" else None
    )
    d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if grads[0] else None
    head = ChunkedHead(hidden, weight, bias, settings.softcap, total, grads)
    parts: list[TokenTerms] = []
    for chunk in head.chunks():
        part = tokens.select(torch.arange(chunk.start, chunk.stop, device=tokens.row.device))
        x = hidden.index_select(0, part.row).to(dtype)
        logprob[chunk] = head.forward(x, part.target, at(settings.temperature, chunk, dtype))
        entropy[chunk] = head.entropy()
        clip_log = None if sequence_log is None else sequence_log[chunk]
        terms = token_terms(part, logprob[chunk], entropy[chunk], settings, clip_log)
        parts.append(terms)
        if any(grads):
            active, dx = head.backward(terms.g, terms.h if settings.entropy_coef else None)
            if d_hidden is not None and dx is not None:
                d_hidden.index_add_(0, part.row[active], dx)
    terms = TokenTerms(*(torch.cat(column) for column in zip(*parts, strict=True)))
    # summed in fp64: tens of thousands of terms of both signs
    loss = (terms.rl.double().sum() + terms.sft.double().sum()).to(dtype)
    return loss, logprob, entropy, token_stats(tokens, logprob, entropy, terms), [d_hidden, head.d_weight, head.d_bias]


def _sequence_log_ratio(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: LossTokens, settings: Settings
) -> torch.Tensor:
    """gspo: mean log-ratio of the policy tokens of each (sequence, stream) [N], from a forward pass of its own."""
    live = tokens.rl_weight != 0
    temperature = settings.temperature
    # SFT and masked tokens have no share in any ratio
    logprob = linear_logprob(
        hidden[tokens.row[live]],
        weight,
        tokens.target[live],
        bias=bias,
        temperature=temperature[live] if isinstance(temperature, torch.Tensor) else temperature,
        softcap=settings.softcap,
    ).logprob
    log_ratio = logprob - _old_logprob(tokens.select(live), logprob)
    group = tokens.sequence * len(Stream) + tokens.stream
    mean = logprob.new_zeros(len(tokens))
    mean[live] = policy.sequence_mean(log_ratio, group[live])
    return mean


def _check(settings: Settings, tokens: LossTokens) -> None:
    if settings.policy_loss not in POLICY_LOSSES:
        raise PactError(f"policy_loss='{settings.policy_loss}' is not known; use one of {', '.join(POLICY_LOSSES)}")
    if settings.delta is not None and settings.policy_loss == "cispo":
        raise PactError("delta is a bound of ppo and gspo; leave it out with policy_loss='cispo'")
    if settings.delta is not None and settings.delta <= policy.bounds(settings.clip)[1]:
        raise PactError(f"delta={settings.delta} must be greater than 1 + clip[1] = {policy.bounds(settings.clip)[1]}")
    if settings.kl_coef and tokens.ref_logprob is None:
        raise PactError("kl_coef needs tokens.ref_logprob; fill it with the reference's log-probs or set kl_coef=0")
    if settings.is_cap is not None and tokens.sampler_logprob is None:
        raise PactError("is_cap needs tokens.sampler_logprob; fill it with the sampler's log-probs or set is_cap=None")


class _Attach(torch.autograd.Function):
    """A loss whose gradients are known already: the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: Gradients, *inputs: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_second_derivatives()
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (None, None, *(None if g is None else (g * upstream).to(dtype) for g, dtype in pairs))
