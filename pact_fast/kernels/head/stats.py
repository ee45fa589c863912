"""Statistics of the loss: sums per context and component, which add up over micro-batches, and their means."""

from __future__ import annotations

import torch

from pact_fast.components import Component, LossContext
from pact_fast.kernels.head.objective import TokenTerms
from pact_fast.kernels.head.tokens import LossTokens

# Means of `summarise`: {name: (sum, count)}.
MEANS = {
    "logprob": ("logprob", "count"),
    "prob": ("prob", "count"),
    "entropy": ("entropy", "count"),
    "ratio": ("ratio", "rl_count"),
    "approx_kl": ("approx_kl", "rl_count"),
    "clip_fraction": ("clipped", "rl_count"),
    "clip_fraction_low": ("clipped_low", "rl_count"),
    "clip_fraction_high": ("clipped_high", "rl_count"),
    "kl": ("kl", "ref_count"),
    "is_weight": ("is_weight", "sampler_count"),
    "logprob_diff": ("logprob_diff", "sampler_count"),
    "divergence": ("divergence", "pair_count"),
}
# The sums of `token_stats`, in order.
SUMS = (
    "count", "rl_count", "sft_count", "ref_count", "sampler_count", "pair_count", "loss_rl", "loss_sft", "logprob",
    "prob", "entropy", "ratio", "approx_kl", "clipped", "clipped_low", "clipped_high", "kl", "is_weight",
    "is_weight_sq", "logprob_diff", "logprob_diff_sq", "divergence",
)  # fmt: skip


def token_stats(
    tokens: LossTokens, logprob: torch.Tensor, entropy: torch.Tensor, terms: TokenTerms, divergence: torch.Tensor
) -> torch.Tensor:
    """Sums over the tokens, fp64 [len(SUMS), contexts, components], named by SUMS; they add up over micro-batches.

    all tokens                 count, loss_rl and loss_sft (weighted, as in the loss), logprob, prob, entropy
    rl_weight ≠ 0              rl_count, ratio (of the policy loss), approx_kl (r − 1 − log r: k3 of π_old and π),
                               clipped, clipped_low, clipped_high (tokens)
    the same, reference known  ref_count, kl (k3 to the reference)
    the same, sampler known    sampler_count, is_weight, is_weight_sq, logprob_diff, logprob_diff_sq
                               (logprob_diff = log π_old − log π_sampler)
    sft_weight ≠ 0             sft_count
    first token of a pair      pair_count, divergence

    Args:
        tokens: The loss table, N rows.
        logprob: [N].
        entropy: [N].
        terms: Of `token_terms`, in the order of the table.
        divergence: [N] of each pair, at its first token; NaN elsewhere.
    """
    rl = tokens.rl_weight != 0
    ref = rl & ~tokens.ref_logprob.isnan() if tokens.ref_logprob is not None else torch.zeros_like(rl)
    sampler = tokens.sampler_logprob
    sampled = rl & ~sampler.isnan() if sampler is not None else torch.zeros_like(rl)
    logprob_diff = terms.old - sampler if sampler is not None else torch.zeros_like(logprob)
    log_ratio = terms.log_ratio.double()
    all_tokens, pair = torch.ones_like(rl), ~divergence.isnan()
    columns = {
        "count": (all_tokens, all_tokens),
        "rl_count": (rl, all_tokens),
        "sft_count": (tokens.sft_weight != 0, all_tokens),
        "ref_count": (ref, all_tokens),
        "sampler_count": (sampled, all_tokens),
        "pair_count": (pair, all_tokens),
        "loss_rl": (all_tokens, terms.rl),
        "loss_sft": (all_tokens, terms.sft),
        "logprob": (all_tokens, logprob),
        "prob": (all_tokens, logprob.double().exp()),
        "entropy": (all_tokens, entropy),
        "ratio": (rl, terms.rule_log_ratio.double().exp()),
        "approx_kl": (rl, torch.expm1(log_ratio) - log_ratio),
        "clipped": (rl, terms.clipped_low | terms.clipped_high),
        "clipped_low": (rl, terms.clipped_low),
        "clipped_high": (rl, terms.clipped_high),
        "kl": (ref, terms.k3),
        "is_weight": (sampled, terms.weight),
        "is_weight_sq": (sampled, terms.weight.square()),
        "logprob_diff": (sampled, logprob_diff),
        "logprob_diff_sq": (sampled, logprob_diff.square()),
        "divergence": (pair, divergence),
    }
    # a product with a one-hot matrix adds in a fixed order on every device, unlike scatter_add
    values = torch.stack([torch.where(mask, value.double(), 0.0) for mask, value in (columns[name] for name in SUMS)])
    cell = tokens.context * len(Component) + tokens.component
    cells = torch.nn.functional.one_hot(cell, len(LossContext) * len(Component)).double()
    return (values @ cells).view(len(SUMS), len(LossContext), len(Component))


def summarise(stats: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means of summed statistics, by context ("prompt/clip_fraction") and component ("trace/tool_call/entropy").

    Cells without tokens are left out. Besides the means: `tokens` is a count, `loss_rl` and `loss_sft` are sums,
    `logprob_diff_std` is the standard deviation, `ess` the effective sample size (Σw)²/Σw² in tokens, and `ess_fraction`
    is `ess` divided by the number of tokens with a sampler log-prob.

    Args:
        stats: `LossOutput.stats`, or the sum of several: {name: [contexts, components]}, on any device.
    """
    host = {name: table.double().cpu() for name, table in stats.items()}
    values: dict[str, float] = {}
    for context in LossContext:
        totals = {name: float(table[context].sum()) for name, table in host.items()}
        values |= _means(context.name.lower(), totals)
        for component in Component:
            cell = {name: float(table[context, component]) for name, table in host.items()}
            values |= _means(f"{context.name.lower()}/{component.name.lower()}", cell)
    return values


def _means(prefix: str, sums: dict[str, float]) -> dict[str, float]:
    if not sums["count"]:
        return {}
    values = {"tokens": sums["count"]}
    if sums["rl_count"]:
        values["loss_rl"] = sums["loss_rl"]
    if sums["sft_count"]:
        values["loss_sft"] = sums["loss_sft"]
    values |= {name: sums[total] / sums[count] for name, (total, count) in MEANS.items() if sums[count]}
    if sums["sampler_count"]:
        mean_sq = sums["logprob_diff_sq"] / sums["sampler_count"]
        values["logprob_diff_std"] = max(mean_sq - values["logprob_diff"] ** 2, 0.0) ** 0.5
        if sums["is_weight_sq"]:
            values["ess"] = sums["is_weight"] ** 2 / sums["is_weight_sq"]
            values["ess_fraction"] = values["ess"] / sums["sampler_count"]
    return {f"{prefix}/{name}": value for name, value in values.items()}
