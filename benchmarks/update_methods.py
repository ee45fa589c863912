"""Methods of the update benchmark: the gradient of one prompt's loss, with and without prefix sharing.

A method turns a prompt (update_problem.py) into passes: decoder → hidden states → loss → backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.harness import Method
from benchmarks.objective import CLIP, clipped_loss
from benchmarks.update_peers import flex_forward, grouped_forward, last_hidden, liger_head, torch_head, use_attention
from benchmarks.update_problem import PromptProblem, Shape, token_tree
from pact_fast.batch.loss_table import ScoredTokens, build_loss_table
from pact_fast.kernels import LossContext, LossTokens, linear_logprob, pact_loss
from pact_fast.tree import PackedBatch, pack, tree_forward

Tensor = torch.Tensor


class Pass(NamedTuple):
    """One forward and backward pass.

    decoder    () → hidden states
    loss       (hidden states, log-probs of the sampling policy or None) → the loss
    logprob    hidden states → log-probs of the supervised tokens
    tokens     that the decoder computes
    """

    decoder: Callable[[], Tensor]
    loss: Callable[[Tensor, Tensor | None], Tensor]
    logprob: Callable[[Tensor], Tensor]
    tokens: int


@dataclass(frozen=True, kw_only=True)
class UpdateMethod(Method):
    """A way to compute the update.

    label       its description in the table
    passes      (model, problem, **setting) → passes
    settings    shape → settings; the first that fits into memory is used
    """

    label: str
    passes: Callable[..., Iterable[Pass]]
    settings: Callable[[Shape], list[dict[str, int]]] = lambda shape: [{}]


# One row per sequence, in batches of sequences of the same length: padded batches without any padding


def per_sequence(
    model: PreTrainedModel, problem: PromptProblem, batch: int, head: Callable[..., Tensor]
) -> Iterator[Pass]:
    """Passes of one padded batch of whole sequences at a time."""
    use_attention(model, "sdpa")
    device, weights = model.device, problem.rl_weights
    x, z, r, y, advantage = (
        torch.as_tensor(t, device=device) for t in (problem.x, problem.z, problem.r, problem.y, problem.advantage)
    )
    nothing = torch.zeros(1, device=device)
    for context, tails, gains, rl_weight, sft_weight in (
        (x, y, advantage, weights[LossContext.PROMPT], 0.0),
        (torch.cat([x, z, r]), y, advantage, weights[LossContext.TRACE], 0.0),
        (x, z[None], nothing, 0.0, problem.sft_weight),
    ):
        for tail, gain in zip(tails.split(batch), gains.split(batch), strict=True):
            ids = torch.cat([context.expand(len(tail), -1), tail], 1)
            logprob = functools.partial(head, model, ids=ids, start=len(context))
            yield Pass(
                decoder=functools.partial(last_hidden, model, input_ids=ids),
                loss=functools.partial(_per_sequence_loss, logprob, gain[:, None], rl_weight, sft_weight),
                logprob=logprob,
                tokens=ids.numel(),
            )


def _per_sequence_loss(logprob, advantage, rl_weight, sft_weight, hidden, old):
    return clipped_loss(logprob(hidden), old, advantage, rl_weight, sft_weight)


def all_positions(model: PreTrainedModel, hidden: Tensor, *, ids: Tensor, start: int) -> Tensor:
    """Log-probs of ids[:, start:] [B, T − start] from the logits [B, T, V] of every position, log-softmax in fp32."""
    logprob = model.lm_head(hidden).float().log_softmax(-1)
    return logprob[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)[:, start - 1 :]


def supervised_positions(model: PreTrainedModel, hidden: Tensor, *, ids: Tensor, start: int) -> Tensor:
    """The same from the logits of these positions only, as TRL's logits_to_keep and selective_log_softmax do it."""
    logits = model.lm_head(hidden[:, start - 1 : -1]).float()
    return logits.gather(-1, ids[:, start:, None]).squeeze(-1) - logits.logsumexp(-1)


# Packed sequences, with or without shared prefixes


def packed(
    model: PreTrainedModel,
    problem: PromptProblem,
    *,
    head: Callable[..., Tensor] | None = None,
    decoder: Callable[[PreTrainedModel, PackedBatch], Tensor] = tree_forward,
    share: bool = True,
    trees: tuple[tuple[LossContext, ...], ...] = (tuple(LossContext),),
) -> Iterator[Pass]:
    """Passes over packs.

    Without sharing, packs have at most as many tokens as the whole tree, and the trace is supervised in one of its copies.

    Args:
        model: The policy.
        problem: The prompt.
        head: (hidden, weight, target) → log-probs; None: the fused loss, pact_loss.
        decoder: (model, pack) → hidden states [T, D].
        share: Whether prefixes are shared.
        trees: One tree for each group of contexts.
    """
    whole = len(token_tree(problem, tuple(LossContext))[0])
    weight = model.lm_head.weight
    for contexts in trees:
        tree, scored = token_tree(problem, contexts)
        for batch in pack([tree], max_tokens=whole, share=share):
            tokens = fp32_loss_tokens(batch, scored).to(model.device)
            yield Pass(
                decoder=functools.partial(decoder, model, batch),
                loss=functools.partial(_tree_loss, weight, tokens, head),
                logprob=functools.partial(_tree_logprob, weight, tokens, head or _linear_logprob),
                tokens=len(batch),
            )


def fp32_loss_tokens(batch: PackedBatch, scored: list[ScoredTokens]) -> LossTokens:
    """The loss table of a pack as tensors, weights in fp32."""
    table, _ = build_loss_table(batch, scored)
    columns = {name: torch.as_tensor(column) for name, column in table._asdict().items() if column is not None}
    return LossTokens(**columns | {name: columns[name].float() for name in ("rl_weight", "sft_weight")})


def _tree_loss(weight, tokens, head, hidden, old):
    if head is None:
        tokens = tokens if old is None else replace(tokens, old_logprob=old)
        return pact_loss(hidden, weight, tokens, clip=(CLIP, CLIP)).loss
    logprob = head(hidden[tokens.row], weight, tokens.target)
    return clipped_loss(logprob, old, tokens.advantage, tokens.rl_weight, tokens.sft_weight)


def _tree_logprob(weight, tokens, head, hidden):
    return head(hidden[tokens.row], weight, tokens.target)


def _linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target).logprob


def _halving_batches(shape: Shape) -> list[dict[str, int]]:
    return [{"batch": shape.rollouts >> i} for i in range(shape.rollouts.bit_length())]


def _batch_of_one(shape: Shape) -> list[dict[str, int]]:
    return [{"batch": 1}]


TREE_PER_CONTEXT = ((LossContext.PROMPT,), (LossContext.TRACE, LossContext.EXPERT))
full_logits = functools.partial(per_sequence, head=all_positions)
selected_logits = functools.partial(per_sequence, head=supervised_positions)
packed_alone = functools.partial(packed, share=False)
prefix = functools.partial(packed, trees=TREE_PER_CONTEXT)


def _per_sequence_methods() -> dict[str, UpdateMethod]:
    found = {}
    for name, passes, logits in (
        ("full-logits", full_logits, "logits of all positions"),
        ("selected-logits", selected_logits, "logits of supervised tokens"),
    ):
        found[name] = UpdateMethod(
            label=f"per sequence, batch of K, {logits}", passes=passes, settings=_halving_batches
        )
        found[f"{name}-b1"] = UpdateMethod(
            label=f"per sequence, batch of 1, {logits}", passes=passes, settings=_batch_of_one
        )
    return found


METHODS = _per_sequence_methods() | {
    "packed-torch": UpdateMethod(
        label="packed sequences, chunked torch head", passes=functools.partial(packed_alone, head=torch_head)
    ),
    "packed-liger": UpdateMethod(
        label="packed sequences, Liger head", passes=functools.partial(packed_alone, head=liger_head),
        package="liger-kernel",
    ),
    "packed-pact": UpdateMethod(label="packed sequences, our head", passes=packed_alone, ours=True),
    "prefix-pact": UpdateMethod(label="shared prefix per context, our kernels", passes=prefix, ours=True),
    "prefix-grouper": UpdateMethod(
        label="shared prefix per context, prefix-grouper, our head",
        passes=functools.partial(prefix, decoder=grouped_forward), package="prefix-grouper",
    ),
    "tree-flex": UpdateMethod(
        label="token tree, FlexAttention, our head", passes=functools.partial(packed, decoder=flex_forward)
    ),
    "tree": UpdateMethod(label="token tree, our kernels", passes=packed, ours=True),
}  # fmt: skip
