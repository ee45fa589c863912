"""The data of the update benchmark: one prompt with rollouts and an expert trace, as token ids, tree and supervised tokens.

A prompt x has K rollouts {τ} and an expert trace h*; r is the question restated after the trace, and may be empty:

loss = (1 − q)·(L_RL({τ} | x h* r) + β·L_SFT(h* | x)) + q·L_RL({τ} | x)

L_RL is PPO's clipped loss, averaged over tokens and rollouts; L_SFT is averaged over the trace's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pact_fast.batch.loss_table import ScoredTokens
from pact_fast.kernels import LossContext
from pact_fast.tree import Node, TokenTree

Q, BETA = 0.3, 0.5


class Shape(NamedTuple):
    """Sizes of one prompt's data.

    prompt      tokens of the prompt x
    trace       tokens of the expert trace h*
    rollout     tokens of a rollout τ
    rollouts    number of rollouts K
    restated    tokens of the question restated after the trace, r
    """

    prompt: int
    trace: int
    rollout: int
    rollouts: int
    restated: int = 0

    @property
    def unshared(self) -> int:
        """Tokens without prefix sharing: every sequence with its whole prefix."""
        context = self.prompt + self.trace + self.restated
        return self.rollouts * (self.prompt + context + 2 * self.rollout) + self.prompt + self.trace

    @property
    def supervised(self) -> int:
        """Tokens with a loss."""
        return 2 * self.rollouts * self.rollout + self.trace


@dataclass(frozen=True)
class PromptProblem:
    """Token ids of one prompt, on the host.

    x            [P] prompt
    z            [Z] expert trace
    r            [R] question restated after the trace
    y            [K, L] rollouts
    advantage    float32 [K]
    weight       fraction of the update's loss
    """

    x: np.ndarray
    z: np.ndarray
    r: np.ndarray
    y: np.ndarray
    advantage: np.ndarray
    weight: float

    @property
    def rl_weights(self) -> dict[LossContext, float]:
        """Weight of the policy loss of one rollout token, by context."""
        per_token = self.weight / self.y.size
        return {LossContext.PROMPT: Q * per_token, LossContext.TRACE: (1 - Q) * per_token}

    @property
    def sft_weight(self) -> float:
        """Weight of −log π of one trace token."""
        return (1 - Q) * BETA * self.weight / len(self.z)


def make_problem(shape: Shape, vocab: int, seed: int, weight: float = 1.0) -> PromptProblem:
    """The sequences of a prompt with random tokens, and its losses."""
    rng = np.random.default_rng(seed)
    x, z, r = (rng.integers(vocab, size=size) for size in (shape.prompt, shape.trace, shape.restated))
    y = rng.integers(vocab, size=(shape.rollouts, shape.rollout))
    return PromptProblem(x, z, r, y, rng.standard_normal(shape.rollouts).astype(np.float32), weight)


def token_tree(problem: PromptProblem, contexts: tuple[LossContext, ...]) -> tuple[TokenTree, list[ScoredTokens]]:
    """The tree x → {τ} and x → h* → r → {τ}, as far as `contexts` need it, and its supervised tokens."""
    tree = TokenTree()
    x = tree.add(problem.x)
    scored: list[ScoredTokens] = []
    parents = {LossContext.PROMPT: x}
    if {LossContext.TRACE, LossContext.EXPERT} & set(contexts):
        trace = tree.add(problem.z, x)
        parents[LossContext.TRACE] = tree.add(problem.r, trace) if len(problem.r) else trace
        if LossContext.EXPERT in contexts:
            scored.append(_expert(trace, problem))
    for context in (c for c in (LossContext.PROMPT, LossContext.TRACE) if c in contexts):
        for k, tokens in enumerate(problem.y):
            scored.append(_rollout(tree.add(tokens, parents[context]), context, k, problem))
    return tree, scored


def _expert(node: Node, problem: PromptProblem) -> ScoredTokens:
    n = len(node.ids)
    return ScoredTokens.of_expert(
        node, prompt=0, index=np.arange(n), component=np.zeros(n, np.uint8), weight=np.full(n, problem.sft_weight)
    )


def _rollout(node: Node, context: LossContext, k: int, problem: PromptProblem) -> ScoredTokens:
    n = len(node.ids)
    return ScoredTokens.of_rollout(
        node, context, prompt=0, rollout=k, index=np.arange(n), component=np.zeros(n, np.uint8),
        advantage=np.full(n, problem.advantage[k]), weight=problem.rl_weights[context],
        sampler_logprob=np.full(n, np.nan, np.float32),
    )  # fmt: skip
