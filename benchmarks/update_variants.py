"""The gradient of one prompt's loss, computed in every way there is: each sequence alone, packed, sharing prefixes, ours.

A prompt x has K rollouts {τ} and an expert trace h*; with r, the question restated after the trace, which may be empty,

loss = (1 − q)·(L_RL({τ} | x h* r) + β·L_SFT(h* | x)) + q·L_RL({τ} | x)

L_RL is PPO's clipped loss, the mean over rollouts of the mean over tokens; L_SFT the mean over the trace's tokens. A
variant turns a prompt into passes: hidden states from the trunk, then a loss from the hidden states, then backward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))  # a script among its siblings, from wherever it is imported

from update_peers import flex_forward, grouped_forward, last_hidden, liger_head, torch_head, use_attention

from pact_fast.kernels import LossContext, LossTokens, linear_logprob, pact_loss
from pact_fast.tree import Node, PackedBatch, TokenTree, pack, tree_forward

Tensor = torch.Tensor
Q, BETA, CLIP = 0.3, 0.5, 0.2


class Shape(NamedTuple):
    """Tokens of the prompt, the trace and a rollout; rollouts; tokens of the question restated after the trace."""

    prompt: int
    trace: int
    rollout: int
    rollouts: int
    restated: int = 0

    @property
    def unshared(self) -> int:
        """Tokens of a prompt if every sequence runs alone."""
        context = self.prompt + self.trace + self.restated
        return self.rollouts * (self.prompt + context + 2 * self.rollout) + self.prompt + self.trace

    @property
    def supervised(self) -> int:
        return 2 * self.rollouts * self.rollout + self.trace


@dataclass(frozen=True)
class Problem:
    """One prompt, on the host, as data come. y [K, L]; advantage [K]; weight: its share of the update's loss."""

    x: np.ndarray
    z: np.ndarray
    r: np.ndarray
    y: np.ndarray
    advantage: np.ndarray
    weight: float

    @property
    def rl_weights(self) -> dict[LossContext, float]:
        """Of one rollout token."""
        per_token = self.weight / self.y.size
        return {LossContext.PROMPT: Q * per_token, LossContext.TRACE: (1 - Q) * per_token}

    @property
    def sft_weight(self) -> float:
        return (1 - Q) * BETA * self.weight / len(self.z)


def make_problem(shape: Shape, vocab: int, seed: int, weight: float = 1.0) -> Problem:
    rng = np.random.default_rng(seed)
    x, z, r = (rng.integers(vocab, size=size) for size in (shape.prompt, shape.trace, shape.restated))
    y = rng.integers(vocab, size=(shape.rollouts, shape.rollout))
    return Problem(x, z, r, y, rng.standard_normal(shape.rollouts).astype(np.float32), weight)


class Pass(NamedTuple):
    """One forward and backward pass. loss and logprob take what trunk gives; loss takes π_old's log-probs or None."""

    trunk: Callable[[], Tensor]
    loss: Callable[[Tensor, Tensor | None], Tensor]
    logprob: Callable[[Tensor], Tensor]
    tokens: int


Passes = Callable[..., Iterable[Pass]]


@dataclass(frozen=True)
class Variant:
    """passes(model, problem, **setting). Settings are tried in this order until one fits into memory."""

    label: str
    passes: Passes
    settings: Callable[[Shape], list[dict[str, int]]] = lambda shape: [{}]
    ours: bool = False


def objective(logprob: Tensor, old: Tensor | None, advantage: Any, rl_weight: Any, sft_weight: Any) -> Tensor:
    """The loss, summed; for every variant that does not use pact_loss."""
    ratio = (logprob - (logprob.detach() if old is None else old)).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return -(rl_weight * gain + sft_weight * logprob).sum()


# Every sequence alone, in batches of sequences of the same length: the best case of padding


def alone(model: PreTrainedModel, problem: Problem, batch: int, head: Callable[..., Tensor]) -> Iterator[Pass]:
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
                trunk=functools.partial(last_hidden, model, input_ids=ids),
                loss=functools.partial(_alone_loss, logprob, gain[:, None], rl_weight, sft_weight),
                logprob=logprob,
                tokens=ids.numel(),
            )


def _alone_loss(logprob, advantage, rl_weight, sft_weight, hidden, old):
    return objective(logprob(hidden), old, advantage, rl_weight, sft_weight)


def all_positions(model: PreTrainedModel, hidden: Tensor, *, ids: Tensor, start: int) -> Tensor:
    """Log-probs of ids[:, start:]: logits [B, T, V] of every position, log-softmax in fp32."""
    logprob = model.lm_head(hidden).float().log_softmax(-1)
    return logprob[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)[:, start - 1 :]


def supervised_positions(model: PreTrainedModel, hidden: Tensor, *, ids: Tensor, start: int) -> Tensor:
    """The same from the logits of these tokens alone, as TRL's logits_to_keep and selective_log_softmax do it."""
    logits = model.lm_head(hidden[:, start - 1 : -1]).float()
    return logits.gather(-1, ids[:, start:, None]).squeeze(-1) - logits.logsumexp(-1)


# Packed rows: prefixes shared or not


def packed(
    model: PreTrainedModel,
    problem: Problem,
    *,
    head: Callable[..., Tensor] | None = None,
    trunk: Callable[[PreTrainedModel, PackedBatch], Tensor] = tree_forward,
    share: bool = True,
    trees: tuple[tuple[LossContext, ...], ...] = (tuple(LossContext),),
) -> Iterator[Pass]:
    """One tree for each group of contexts. head: log-probs of (hidden, weight, target); None: pact_loss.

    Without sharing, packs are as large as the whole tree, and the trace is supervised in one of the rollouts' copies.
    """
    whole = len(token_tree(problem, tuple(LossContext))[0])
    weight = model.lm_head.weight
    for contexts in trees:
        tree, parts = token_tree(problem, contexts)
        for batch in pack([tree], max_tokens=whole, share=share):
            tokens = loss_table(batch, parts, problem).to(model.device)
            yield Pass(
                trunk=functools.partial(trunk, model, batch),
                loss=functools.partial(_tree_loss, weight, tokens, head),
                logprob=functools.partial(_tree_logprob, weight, tokens, head or _linear_logprob),
                tokens=len(batch),
            )


class Part(NamedTuple):
    node: Node
    context: LossContext
    sequence: int
    advantage: float


def token_tree(problem: Problem, contexts: tuple[LossContext, ...]) -> tuple[TokenTree, list[Part]]:
    """x → {τ} and x → h* → r → {τ}, as far as `contexts` ask for them."""
    tree = TokenTree()
    x = tree.add(problem.x)
    parts: list[Part] = []
    contexts = {LossContext.PROMPT: x}
    if {LossContext.TRACE, LossContext.EXPERT} & set(contexts):
        trace = tree.add(problem.z, x)
        contexts[LossContext.TRACE] = tree.add(problem.r, trace) if len(problem.r) else trace
        if LossContext.EXPERT in contexts:
            parts.append(Part(trace, LossContext.EXPERT, 0, 0.0))
    for context in (s for s in (LossContext.PROMPT, LossContext.TRACE) if s in contexts):
        for tokens, advantage in zip(problem.y, problem.advantage, strict=True):
            node = tree.add(tokens, contexts[context])
            parts.append(Part(node, context, len(parts), float(advantage)))
    return tree, parts


def loss_table(batch: PackedBatch, parts: list[Part], problem: Problem) -> LossTokens:
    """The supervised tokens of a pack."""
    owned = {id(node) for node in batch.owned}
    here = [part for part in parts if id(part.node) in owned]
    lengths = torch.tensor([len(part.node.ids) for part in here])
    expert = problem.sft_weight

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32).repeat_interleave(lengths)

    def numbers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64).repeat_interleave(lengths)

    rows, targets = ([batch.rows(part.node) for part in here], [part.node.ids for part in here])
    return LossTokens(
        row=torch.as_tensor(np.concatenate([np.zeros(0, np.int64), *rows])),
        target=torch.as_tensor(np.concatenate([np.zeros(0, np.int64), *targets])),
        context=numbers(part.context for part in here),
        component=numbers(0 for _ in here),
        sequence=numbers(range(len(here))),
        advantage=column(part.advantage for part in here),
        old_logprob=column(torch.nan for _ in here),
        rl_weight=column(problem.rl_weights.get(part.context, 0.0) for part in here),
        sft_weight=column(expert if part.context == LossContext.EXPERT else 0.0 for part in here),
    )


def _tree_loss(weight, tokens, head, hidden, old):
    if head is None:
        tokens = tokens if old is None else replace(tokens, old_logprob=old)
        return pact_loss(hidden, weight, tokens, clip=(CLIP, CLIP)).loss
    logprob = head(hidden[tokens.row], weight, tokens.target)
    return objective(logprob, old, tokens.advantage, tokens.rl_weight, tokens.sft_weight)


def _tree_logprob(weight, tokens, head, hidden):
    return head(hidden[tokens.row], weight, tokens.target)


def _linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target).logprob


def _halves(shape: Shape) -> list[dict[str, int]]:
    return [{"batch": shape.rollouts >> i} for i in range(shape.rollouts.bit_length())]


def _one(shape: Shape) -> list[dict[str, int]]:
    return [{"batch": 1}]


ONCE_PER_CONTEXT = ((LossContext.PROMPT,), (LossContext.TRACE, LossContext.EXPERT))
full = functools.partial(alone, head=all_positions)
kept = functools.partial(alone, head=supervised_positions)
unshared = functools.partial(packed, share=False)
flat = functools.partial(packed, trees=ONCE_PER_CONTEXT)

VARIANTS = {
    "alone": Variant("(a) each alone, logits of all positions", full, _halves),
    "alone-1": Variant("(a) one sequence at a time", full, _one),
    "kept": Variant("(a') each alone, logits of supervised tokens", kept, _halves),
    "kept-1": Variant("(a') one sequence at a time", kept, _one),
    "packed-torch": Variant("(b) packed, chunked torch head", functools.partial(unshared, head=torch_head)),
    "packed-liger": Variant("(b) packed, Liger head", functools.partial(unshared, head=liger_head)),
    "packed-pact": Variant("(b) packed, our head", unshared, ours=True),
    "flat-pact": Variant("(c) flat sharing, our kernels", flat, ours=True),
    "flat-prefix-grouper": Variant(
        "(c) flat sharing, prefix-grouper, our head", functools.partial(flat, trunk=grouped_forward)
    ),
    "flex": Variant("(d) tree, FlexAttention, our head", functools.partial(packed, trunk=flex_forward)),
    "tree": Variant("(e) tree, ours", packed, ours=True),
}
