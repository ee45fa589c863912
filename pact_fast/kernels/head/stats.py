"""Statistics of the loss as sums per context and component, and their readable means."""

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
    """Sums over the tokens, fp64 [len(SUMS), 3 contexts, 5 components]; those of micro-batches add up.

    divergence [N]: of pairs, at their first token; NaN elsewhere.

    Over all tokens    count, loss_rl and loss_sft (weighted, as in the loss), logprob, prob, entropy
    rl_weight ≠ 0      rl_count, ratio (of the clip rule), approx_kl (k3 of π_old against π: r − 1 − log r),
                       clipped, clipped_low, clipped_high (tokens)
    sft_weight ≠ 0     sft_count
    rl, reference known  ref_count, kl (k3 against the reference)
    rl, sampler known  sampler_count, is_weight, is_weight_sq, logprob_diff, logprob_diff_sq (log π_old − log π_sampler)
    first of a pair    pair_count, divergence
    """
    rl = tokens.rl_weight != 0
    ref = rl & ~tokens.ref_logprob.isnan() if tokens.ref_logprob is not None else torch.zeros_like(rl)
    sampler = tokens.sampler_logprob
    sampled = rl & ~sampler.isnan() if sampler is not None else torch.zeros_like(rl)
    logprob_diff = terms.old - sampler if sampler is not None else torch.zeros_like(logprob)
    log_ratio = terms.log_ratio.double()
    everything, pair = torch.ones_like(rl), ~divergence.isnan()
    columns = {
        "count": (everything, everything),
        "rl_count": (rl, everything),
        "sft_count": (tokens.sft_weight != 0, everything),
        "ref_count": (ref, everything),
        "sampler_count": (sampled, everything),
        "pair_count": (pair, everything),
        "loss_rl": (everything, terms.rl),
        "loss_sft": (everything, terms.sft),
        "logprob": (everything, logprob),
        "prob": (everything, logprob.double().exp()),
        "entropy": (everything, entropy),
        "ratio": (rl, terms.clip_log.double().exp()),
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
    # a product with 0/1 cells adds in a fixed order on every device, unlike scattered additions
    values = torch.stack([torch.where(mask, value.double(), 0.0) for mask, value in (columns[name] for name in SUMS)])
    cell = tokens.context * len(Component) + tokens.component
    cells = torch.nn.functional.one_hot(cell, len(LossContext) * len(Component)).double()
    return (values @ cells).view(len(SUMS), len(LossContext), len(Component))


def summarise(stats: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means of summed statistics, by context ("prompt/clip_fraction") and component ("trace/tool_call/entropy").

    Empty cells are left out. `tokens` counts tokens, `loss_rl` and `loss_sft` are sums, `logprob_diff_std` is its
    standard deviation, `ess` the effective sample size (Σw)²/Σw² in tokens, `ess_fraction` the same per token.
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
