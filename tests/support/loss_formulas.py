"""Loss and gradients of algorithms from formulas in fp64, to compare with those of their prompt batches.

A hidden state is a random vector that belongs to a prefix of tokens, so formulas, which work on whole sequences, and packs of
trees see the same hidden states by construction.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pact_fast.algorithms.base import Algorithm, Group, StepContext
from pact_fast.kernels import LossContext, pact_loss
from pact_fast.train.importance import set_importance_weights
from pact_fast.train.learner import loss_table_to_tensors, token_pairs
from pact_fast.tree import pack

WIDTH, VOCAB = 12, 512


class Hiddens:
    """prefix of token ids → a leaf vector [WIDTH]."""

    def __init__(self):
        self.leaves: dict[bytes, torch.Tensor] = {}

    def __call__(self, prefix: np.ndarray) -> torch.Tensor:
        return self.of(key_of(prefix))

    def of(self, key: bytes) -> torch.Tensor:
        if key not in self.leaves:
            generator = torch.Generator().manual_seed(zlib.crc32(key))
            self.leaves[key] = torch.randn(WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        return self.leaves[key]


def key_of(prefix: np.ndarray) -> bytes:
    """Bytes are hashed once and compared fast; prefixes of hundreds of tokens are looked up thousands of times."""
    return np.asarray(prefix, np.int64).tobytes()


def head_weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)


def log_pi(hiddens: Hiddens, weight: torch.Tensor, context, ids, n: int) -> torch.Tensor:
    """log π(ids[n] | context, ids[:n])."""
    logits = hiddens(np.concatenate([context, ids[:n]])) @ weight.T
    return torch.log_softmax(logits, -1)[int(ids[n])]


class Truth(NamedTuple):
    """A loss and its gradients, by the head and by the hidden state of every prefix."""

    loss: float
    weight: torch.Tensor
    hiddens: dict[bytes, torch.Tensor]

    @classmethod
    def of(cls, loss: torch.Tensor, hiddens: Hiddens, weight: torch.Tensor) -> Truth:
        leaves = [weight, *hiddens.leaves.values()]  # those of a teacher alone are not used, and have gradients of 0
        by_weight, *by_leaf = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        return cls(float(loss.detach()), by_weight, dict(zip(hiddens.leaves, by_leaf, strict=True)))


def assert_computes(
    algorithm: Algorithm,
    groups: list[Group],
    step: StepContext,
    expected: torch.Tensor | Truth,
    hiddens: Hiddens,
    weight: torch.Tensor,
    share: bool = True,
    merge: bool = True,
) -> None:
    """The algorithm's loss of `groups` and its gradients by hidden states and head are those of `expected`, to 1e-10."""
    truth = expected if isinstance(expected, Truth) else Truth.of(expected, hiddens, weight)
    prompt_batches = algorithm.prompt_batches(groups, step)
    batches = pack([tree for one in prompt_batches for tree in one.trees], max_tokens=700, share=share, merge=merge)
    scored = [s for one in prompt_batches for s in one.scored]
    prefixes = [
        [key_of(batch.input_ids[: q + 1][batch.subtree_end[: q + 1] > q]) for q in range(len(batch))]
        for batch in batches
    ]
    rows = [torch.stack([hiddens.of(p).detach() for p in pack_prefixes]) for pack_prefixes in prefixes]
    needs = algorithm.requirements(sampler_differs=False)
    if needs.old_logprob:
        fill_old(batches, scored, rows, weight)
        set_importance_weights(scored, LossContext.TRACE, needs.importance[LossContext.TRACE])
    loss, weight_grad, leaf_grads = 0.0, torch.zeros_like(weight), {}
    for batch, hidden, pack_prefixes in zip(batches, rows, prefixes, strict=True):
        tokens, here = loss_table_to_tensors(batch, scored)
        hidden.requires_grad_()
        settings = {**algorithm.loss_settings(), **token_pairs(here, needs, "cpu")}
        out = pact_loss(hidden, weight, tokens, **settings, importance_cap=needs.importance_cap, backend="torch")
        d_hidden, d_weight = torch.autograd.grad(out.loss, [hidden, weight])
        loss += float(out.loss.detach())
        weight_grad += d_weight
        for prefix, gradient in zip(pack_prefixes, d_hidden, strict=True):
            leaf_grads[prefix] = leaf_grads.get(prefix, 0) + gradient

    assert truth.weight.norm() > 1e-3  # the case exercises something (at ratio 1 a policy loss itself is near zero)
    assert loss == pytest.approx(truth.loss, rel=1e-10, abs=1e-12)
    assert (weight_grad - truth.weight).norm() <= 1e-10 * truth.weight.norm()
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    prefixes_seen = list(set(leaf_grads) | set(truth.hiddens))
    ours, theirs = (torch.stack([g.get(p, zero) for p in prefixes_seen]) for g in (leaf_grads, truth.hiddens))
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def fill_old(batches, scored, rows, weight) -> None:
    for batch, hidden in zip(batches, rows, strict=True):
        for s in (s for s in scored if s.context != 2 and any(s.node is node for node in batch.owned)):
            logits = hidden[batch.rows(s.node)[s.index]] @ weight.detach().T
            s.old_logprob = torch.log_softmax(logits, -1)[
                torch.arange(len(s.index)), torch.as_tensor(s.node.ids[s.index])
            ].numpy()
