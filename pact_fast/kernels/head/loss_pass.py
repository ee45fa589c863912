"""The one pass of `pact_loss` over the logits: chunk by chunk, forward, loss terms, backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pact_fast.kernels.head.chunked import ChunkedHead
from pact_fast.kernels.head.divergence import TokenPairs, make_pairing, pair_divergences
from pact_fast.kernels.head.gemm import accumulation_dtype
from pact_fast.kernels.head.hidden_grad import HiddenGradient
from pact_fast.kernels.head.logprob import as_operands, cast_gradient, gradient_dtype, linear_logprob_op
from pact_fast.kernels.head.objective import (
    CallableLoss,
    LossSettings,
    SequenceTerms,
    TokenTerms,
    old_logprob_of,
    sequence_group,
    sequence_mean,
    spread_over_sequences,
    token_terms,
)
from pact_fast.kernels.head.stats import token_stats
from pact_fast.kernels.head.tokens import LossTokens


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
    statistics: Sequence[str] = (),
) -> Any:
    """The results of `pact_loss_op`."""
    dtype, total = accumulation_dtype(hidden, weight), len(tokens)
    d_hidden = HiddenGradient(hidden.shape, tokens.row, dtype, gradient_dtype(hidden)) if grads[0] else None
    parameters = (hidden, weight, weight if bias is None else bias)
    hidden, weight = as_operands(operand_dtype, hidden, weight)
    sequence = None
    if settings.rule.sequence_ratio:
        sequence = _sequence_terms(hidden, weight, bias, tokens, temperature, settings, backend)
    order = _processing_order(tokens, settings, pairs)
    entropy_grad = bool(settings.entropy_coef)
    if isinstance(settings.rule, CallableLoss):
        entropy_grad |= settings.rule.needs_entropy(hidden.new_zeros(0, dtype=dtype))
    head = ChunkedHead(
        backend, hidden, weight, bias, settings.softcap, total, grads, pairs is not None, entropy_grad, statistics
    )  # fmt: skip
    row_values: list[torch.Tensor] = []
    chunk_values: list[tuple[torch.Tensor, ...]] = []
    chunk_terms: list[TokenTerms] = []
    for chunk in head.chunks():
        index = order[chunk]
        part = tokens.select(index)
        stats = head.forward(hidden.index_select(0, part.row), part.target, temperature[index])
        pairing = None if pairs is None else make_pairing(pairs, chunk, head)
        if statistics:
            row_values.append(head.row_statistics())
        of_chunk = None if sequence is None else SequenceTerms(*(None if t is None else t[index] for t in sequence))  # type: ignore[arg-type]
        terms = token_terms(part, stats.logprob, stats.entropy, settings, of_chunk, index)
        chunk_values.append((stats.logprob, stats.entropy, pair_divergences(pairing, pairs, terms.g)))
        chunk_terms.append(terms)
        if any(grads):
            source, dx = head.backward(terms.g, terms.h if entropy_grad else None, pairing)
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
    values = torch.cat(row_values, 1)[:, inverse] if statistics else logprob.new_zeros(0, total)
    d_weight, d_bias = head.weight_grads()
    return (
        loss.to(dtype), logprob, entropy, by_pair, token_stats(tokens, logprob, entropy, terms, divergence), values,
        cast_gradient(None if d_hidden is None else d_hidden.result(), parameters[0]),
        cast_gradient(d_weight, parameters[1]), cast_gradient(d_bias, parameters[2]),
    )  # fmt: skip


def _processing_order(tokens: LossTokens, settings: LossSettings, pairs: TokenPairs | None) -> torch.Tensor:
    """[N] permutation in which tokens are processed: pairs first, side by side; tokens without a gradient last.

    Active rows then fill whole chunks, so that their GEMMs are large and efficient.
    """
    inactive = (tokens.rl_weight == 0) & (tokens.sft_weight == 0)
    for weight in (tokens.kl_weight, tokens.entropy_weight):
        inactive &= True if weight is None else weight == 0
    terms_only = not settings.kl_coef and not settings.entropy_coef and not isinstance(settings.rule, CallableLoss)
    if terms_only and not settings.rule.sequence_gradient:
        inactive |= (tokens.advantage == 0) & (tokens.sft_weight == 0)
    if pairs is None:
        return torch.argsort(inactive, stable=True)
    order = pairs.order(len(tokens))
    paired = pairs.index.numel()
    unpaired = order[paired:]
    return torch.cat([order[:paired], unpaired[torch.argsort(inactive[unpaired], stable=True)]])


def _sequence_terms(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: LossTokens,
    temperature: torch.Tensor,
    settings: LossSettings,
    backend: str,
) -> SequenceTerms:
    """Mean log-ratio over the policy tokens of each (sequence, context), from a separate forward pass; 0 elsewhere."""
    policy = tokens.rl_weight != 0  # the other tokens enter no ratio
    now, *_ = linear_logprob_op(
        hidden[tokens.row[policy]], weight, bias, tokens.target[policy], temperature[policy], settings.softcap, backend
    )  # fmt: skip
    log_ratio = now - old_logprob_of(tokens.select(policy), now)
    mean, logprob = now.new_zeros(len(tokens)), now.new_zeros(len(tokens))
    mean[policy], logprob[policy] = sequence_mean(log_ratio, sequence_group(tokens)[policy]), now
    sequence = SequenceTerms(mean)
    return spread_over_sequences(tokens, logprob, settings, sequence) if settings.rule.sequence_gradient else sequence
