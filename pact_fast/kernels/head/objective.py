"""Policy-loss rules and their registry, SFT losses, the k3 KL estimator, importance weights: pure functions on [n] tensors.

Every term comes with its derivative by the token's log-prob, so that gradients can be formed in the same pass that
computes the logits. log_ratio is log π − log π_old. Formulas: docs/loss.md and docs/method.md, section 2.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from pact_fast.components import LossContext
from pact_fast.errors import PactError
from pact_fast.kernels.head.tokens import LossTokens
from pact_fast.registry import Registry

Clip = tuple[float | None, float | None]


class PolicyTerm(NamedTuple):
    """Policy loss of n tokens, before weights.

    value         [n]       the loss
    slope         [n]       d value / d logprob
    clipped_low   bool [n]  tokens that count as clipped at the lower bound; None: none. Statistics only.
    clipped_high  bool [n]  tokens that count as clipped at the upper bound; None: none. Statistics only.
    entropy_slope [n]       d value / d entropy; None: 0
    """

    value: torch.Tensor
    slope: torch.Tensor
    clipped_low: torch.Tensor | None = None
    clipped_high: torch.Tensor | None = None
    entropy_slope: torch.Tensor | None = None


class PolicyLoss(ABC):
    """A policy loss per token, chosen by name: `pact_loss(policy_loss="name" or "file.py:Class")`.

    Register a subclass with `@policy_loss("name")`, or leave it unregistered and name it `file.py:Class`. It is
    constructed without arguments, once per call.

    sequence_ratio     True: log_ratio is the mean over the policy tokens of the token's (sequence, context)
    sequence_gradient  True: the mean is differentiated, so that all of them get the gradient of every token's term;
                       False: only the token itself does
    takes_delta        True: `pact_loss(delta=…)` is allowed and passed to `term`
    """

    sequence_ratio: ClassVar[bool] = False
    sequence_gradient: ClassVar[bool] = False
    takes_delta: ClassVar[bool] = False

    @abstractmethod
    def term(
        self, log_ratio: torch.Tensor, advantage: torch.Tensor, logprob: torch.Tensor, clip: Clip, delta: float | None
    ) -> PolicyTerm:
        """The term of n tokens and its slope. No autograd runs: the slope must be returned.

        Args:
            log_ratio: [n] fp32 (fp64 for fp64 input). 0 where the advantage is 0, so that an overflowing ratio cannot
                reach the loss; a term should be 0 there.
            advantage: [n], same dtype.
            logprob: [n] log π, same dtype.
            clip: (low, high) of `pact_loss`; see `bounds`.
            delta: Dual-clip bound, or None.
        """


policy_loss: Registry[type[PolicyLoss]] = Registry("policy loss", "policy_loss")


def make_policy_loss(name: str | TokenLoss) -> PolicyLoss:
    """The rule that a registered name, `file.py:Class` or `module:Class` stands for, or that a function is.

    Raises:
        PactError: There is no such name, file or class, or it is no subclass of PolicyLoss.
    """
    if not isinstance(name, str):
        return CallableLoss(name)
    cls: Any = policy_loss.get(name)
    if not (isinstance(cls, type) and issubclass(cls, PolicyLoss)):
        raise PactError(f"policy_loss '{name}': derive the class from pact_fast.kernels.PolicyLoss")
    return cls()


@policy_loss("ppo")
class Ppo(PolicyLoss):
    """−min(min(r, δ)·A, clip(r, 1 − low, 1 + high)·A) (PPO, arXiv 1707.06347; δ: dual clip, arXiv 1912.09729).

    A token counts as clipped where a bound sets its gradient to 0.
    """

    takes_delta = True

    def term(
        self, log_ratio: torch.Tensor, advantage: torch.Tensor, logprob: torch.Tensor, clip: Clip, delta: float | None
    ) -> PolicyTerm:
        low, high = bounds(clip)
        ratio = log_ratio.exp()
        clipped_low = (ratio < low) & (advantage < 0)
        clipped_high = (ratio > high) & (advantage > 0)
        if delta is not None:
            clipped_high = clipped_high | ((ratio > delta) & (advantage < 0))
        used = ratio if delta is None else ratio.clamp(max=delta)
        value = -torch.minimum(used * advantage, ratio.clamp(low, high) * advantage)
        slope = torch.where(clipped_low | clipped_high, 0.0, -ratio * advantage)
        return PolicyTerm(value, slope, clipped_low, clipped_high)


@policy_loss("gspo")
class Gspo(Ppo):
    """PPO's rule on one ratio per (sequence, context), the geometric mean of the token ratios (arXiv 2507.18071).

    With s that ratio and sg stop-gradient, the token's ratio is sg(s)·exp(log π − sg(log π)) (GSPO-token). Its value and
    its derivative by log π are both s, so PPO's slope holds.
    """

    sequence_ratio = True


@policy_loss("gspo_sequence")
class GspoSequence(Gspo):
    """GSPO's own form (arXiv 2507.18071, equation 5): the sequence's ratio itself is differentiated.

    Equal to "gspo" if the tokens of a sequence have the same advantage and weight.
    """

    sequence_gradient = True


@policy_loss("cispo")
class Cispo(PolicyLoss):
    """−sg(clip(r, 1 − low, 1 + high))·A·log π (arXiv 2506.13585): bounds cap a token's weight, not its gradient.

    A token counts as clipped where its ratio is outside the bounds.
    """

    def term(
        self, log_ratio: torch.Tensor, advantage: torch.Tensor, logprob: torch.Tensor, clip: Clip, delta: float | None
    ) -> PolicyTerm:
        low, high = bounds(clip)
        ratio = log_ratio.exp()
        slope = -ratio.clamp(low, high) * advantage
        return PolicyTerm(slope * logprob, slope, ratio < low, ratio > high)


TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class CallableLoss(PolicyLoss):
    """A function (logprob [n], entropy [n], index [n]) → loss [n] as a rule; autograd gives its slopes."""

    def __init__(self, function: TokenLoss):
        self._function = function

    def needs_entropy(self, like: torch.Tensor) -> bool:
        """Whether the loss is differentiated by the entropy, found with no token at all."""
        empty = like.new_zeros(0)
        slope = self.evaluate(empty, empty.clone(), torch.zeros(0, dtype=torch.int64, device=like.device)).entropy_slope
        return slope is not None

    def evaluate(self, logprob: torch.Tensor, entropy: torch.Tensor, index: torch.Tensor) -> PolicyTerm:
        """The term of the tokens at `index`. Raises PactError if the function does not return one loss per token."""
        with torch.enable_grad():
            x, y = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
            loss = self._function(x, y, index)
            if not isinstance(loss, torch.Tensor) or loss.shape != logprob.shape:
                got = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise PactError(
                    f"policy_loss: the function returned {got}; it must return one loss per token {list(x.shape)}"
                )
            slopes: tuple[torch.Tensor | None, ...] = (None, None)
            if loss.requires_grad:
                slopes = torch.autograd.grad(loss, (x, y), torch.ones_like(loss), allow_unused=True)
        slope = torch.zeros_like(logprob) if slopes[0] is None else slopes[0]
        return PolicyTerm(loss.detach().to(logprob.dtype), slope, entropy_slope=slopes[1])

    def term(
        self, log_ratio: torch.Tensor, advantage: torch.Tensor, logprob: torch.Tensor, clip: Clip, delta: float | None
    ) -> PolicyTerm:
        raise NotImplementedError("callable losses are evaluated by `evaluate`")


SftLoss = Callable[[torch.Tensor], torch.Tensor]


def sft_term(logprob: torch.Tensor, loss: SftLoss | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The SFT loss of n tokens and its derivative by log π, [n] each: of −log π, or of a function log π [n] → loss [n].

    Raises:
        PactError: The function does not return one loss per token.
    """
    if loss is None:
        return -logprob, torch.full_like(logprob, -1.0)
    with torch.enable_grad():
        x = logprob.detach().requires_grad_()
        value = loss(x)
        if not isinstance(value, torch.Tensor) or value.shape != x.shape:
            got = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise PactError(f"sft_loss: the function returned {got}; it must return one loss per token {list(x.shape)}")
        slope = torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else torch.zeros_like(logprob)
    return value.detach().to(logprob.dtype), slope


def bounds(clip: Clip) -> tuple[float, float]:
    """(1 − low, 1 + high); 0 and ∞ where a side is None."""
    low, high = clip
    return (0.0 if low is None else 1.0 - low), (float("inf") if high is None else 1.0 + high)


def sequence_mean(log_ratio: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Mean of log_ratio [n] over each group (int64 ids [n]), broadcast back to the group's tokens [n]."""
    _, inverse, count = group.unique(return_inverse=True, return_counts=True)
    total = log_ratio.new_zeros(len(count)).index_add_(0, inverse, log_ratio)
    return (total / count)[inverse]


def k3(reference: torch.Tensor, logprob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(d) − d − 1 with d = log π_ref − log π, and its derivative by log π; [n] each, both 0 where π_ref is NaN.

    Source: Schulman, "Approximating KL Divergence" (2020), estimator k3.
    """
    d = torch.where(reference.isnan(), 0.0, reference - logprob)
    exp_minus_1 = torch.expm1(d)
    return exp_minus_1 - d, -exp_minus_1


def importance_weight(old: torch.Tensor, sampler: torch.Tensor, cap: torch.Tensor) -> torch.Tensor:
    """min(cap, exp(old − sampler)), all [n]; 1 where the sampler's log-prob or the cap is NaN."""
    weight = torch.minimum((old - sampler).exp(), cap)
    return torch.where(sampler.isnan() | cap.isnan(), 1.0, weight)


class LossSettings(NamedTuple):
    """The settings of `pact_loss`.

    importance_cap  one cap per LossContext, NaN for no importance weights
    sft_loss        None: −log π
    """

    rule: PolicyLoss
    clip: Clip
    delta: float | None
    kl_coef: float
    entropy_coef: float
    importance_cap: Sequence[float] | None
    softcap: float | None
    sft_loss: SftLoss | None = None


class SequenceTerms(NamedTuple):
    """Per-sequence inputs of the loss terms of n tokens, [n] each.

    log_ratio  mean log-ratio of the token's (sequence, context)
    slope      derivative of the policy loss of the whole sequence by the token's log-prob, weights included; None: that of
               the token's own term
    """

    log_ratio: torch.Tensor
    slope: torch.Tensor | None = None


class TokenTerms(NamedTuple):
    """Loss terms of n tokens; all [n].

    rl, sft            policy loss (with KL and entropy) and SFT loss, weighted
    g, h               dL/dlogprob, dL/dentropy
    k3                 KL to the reference, unweighted
    log_ratio          log π − log π_old of the token
    rule_log_ratio     the log-ratio that the rule uses: the same, or the sequence's
    weight             importance weight of the policy term
    old                log π_old, NaN replaced by log π
    clipped_low/_high  bool, see PolicyTerm
    """

    rl: torch.Tensor
    sft: torch.Tensor
    g: torch.Tensor
    h: torch.Tensor
    k3: torch.Tensor
    log_ratio: torch.Tensor
    rule_log_ratio: torch.Tensor
    weight: torch.Tensor
    old: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def token_terms(
    tokens: LossTokens,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    settings: LossSettings,
    sequence: SequenceTerms | None = None,
    index: torch.Tensor | None = None,
) -> TokenTerms:
    """The loss of every token and its derivatives.

    Args:
        tokens: n rows of the loss table.
        logprob: [n] log π, fp32 or fp64; everything is computed in this dtype.
        entropy: [n], in nats.
        settings: Of the call.
        sequence: For rules with `sequence_ratio`; else None.
        index: int64 [n], the tokens' places in the whole table, for callable losses.
    """
    dtype = logprob.dtype
    rl_weight, sft_weight, advantage = (t.to(dtype) for t in (tokens.rl_weight, tokens.sft_weight, tokens.advantage))
    old = old_logprob_of(tokens, logprob)
    log_ratio = logprob - old
    rule_log_ratio = log_ratio if sequence is None else sequence.log_ratio
    if isinstance(settings.rule, CallableLoss):
        assert index is not None
        term = settings.rule.evaluate(logprob, entropy, index)
    else:
        # an advantage of 0 makes the term 0 even where the ratio overflows
        safe_log_ratio = torch.where(advantage == 0, 0.0, rule_log_ratio)
        term = settings.rule.term(safe_log_ratio, advantage, logprob, settings.clip, settings.delta)
    weight = torch.ones_like(logprob)
    if settings.importance_cap is not None and tokens.sampler_logprob is not None:
        caps = torch.tensor(settings.importance_cap, dtype=dtype, device=old.device)[tokens.context]
        weight = importance_weight(old, tokens.sampler_logprob.to(dtype), caps)
    reference = torch.full_like(logprob, torch.nan) if tokens.ref_logprob is None else tokens.ref_logprob.to(dtype)
    kl, kl_slope = k3(reference, logprob)
    # the term, KL and entropy bonus; with the same weight they are added first
    sequence_slope = None if sequence is None else sequence.slope
    own_slope = weight * term.slope if sequence_slope is None else torch.zeros_like(logprob)
    policy = [(rl_weight, weight * term.value, own_slope)]
    for own, value, slope in (
        (tokens.kl_weight, settings.kl_coef * kl, settings.kl_coef * kl_slope),
        (tokens.entropy_weight, -settings.entropy_coef * entropy, None),
    ):
        if own is None:
            _, total, total_slope = policy[0]
            policy[0] = (rl_weight, total + value, total_slope if slope is None else total_slope + slope)
        else:
            policy.append((own.to(dtype), value, torch.zeros_like(value) if slope is None else slope))
    g = sum((_weighted(w, slope) for w, _, slope in policy[1:]), _weighted(*policy[0][::2]))
    g = g if sequence_slope is None else g + sequence_slope
    entropy_weight = rl_weight if tokens.entropy_weight is None else tokens.entropy_weight.to(dtype)
    h = -settings.entropy_coef * entropy_weight
    if term.entropy_slope is not None:
        h = h + _weighted(rl_weight, weight * term.entropy_slope)
    sft, sft_slope = sft_term(logprob, settings.sft_loss)
    unclipped = torch.zeros_like(logprob, dtype=torch.bool)
    return TokenTerms(
        rl=sum((_weighted(w, value) for w, value, _ in policy[1:]), _weighted(*policy[0][:2])),
        sft=_weighted(sft_weight, sft),
        g=g + _weighted(sft_weight, sft_slope),
        h=h,
        k3=kl,
        log_ratio=log_ratio,
        rule_log_ratio=rule_log_ratio,
        weight=weight,
        old=old,
        clipped_low=unclipped if term.clipped_low is None else term.clipped_low,
        clipped_high=unclipped if term.clipped_high is None else term.clipped_high,
    )


def _weighted(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weight·value, exactly 0 where the weight is 0: as a product, 0·inf would be NaN."""
    return torch.where(weight != 0, weight * value, 0.0)


def spread_over_sequences(
    tokens: LossTokens, logprob: torch.Tensor, settings: LossSettings, sequence: SequenceTerms
) -> SequenceTerms:
    """`sequence` with the slopes of a rule that differentiates the mean log-ratio.

    Every token's term depends on the log-probs of all n policy tokens of its sequence, on each with 1/n of its slope.
    """
    plain = settings._replace(kl_coef=0.0, entropy_coef=0.0)
    policy_alone = dataclasses.replace(tokens, sft_weight=torch.zeros_like(tokens.sft_weight))
    slope = token_terms(policy_alone, logprob, torch.zeros_like(logprob), plain, sequence).g
    policy = tokens.rl_weight != 0
    mean = torch.zeros_like(slope)
    mean[policy] = sequence_mean(slope[policy], sequence_group(tokens)[policy])
    return sequence._replace(slope=mean)


def sequence_group(tokens: LossTokens) -> torch.Tensor:
    """[n] an id for each (sequence, context)."""
    assert tokens.sequence is not None
    return tokens.sequence * len(LossContext) + tokens.context


def old_logprob_of(tokens: LossTokens, logprob: torch.Tensor) -> torch.Tensor:
    """log π_old [n]; where the table has NaN, log π itself, so that the ratio is exactly 1."""
    return torch.where(tokens.old_logprob.isnan(), logprob, tokens.old_logprob.to(logprob.dtype))
