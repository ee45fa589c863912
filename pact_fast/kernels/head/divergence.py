"""Coupled tokens: a divergence between the full next-token distributions of two rows, neither ever materialised.

With the same rollout token under both contexts as a pair (first: prompt-only, second: trace-conditioned) this is the
distillation term of sdft and opsd, and a measure of how much the policy leans on the trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pact_fast.errors import PactError
from pact_fast.kernels.head.chunked import ChunkedHead
from pact_fast.kernels.head.softmax_torch import JSD, KL, Pairing

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


@dataclass
class TokenPairs:
    """M pairs of tokens; a token is in one pair at most. p, q: the softmax of the first and of the second token's row.

    index        int64 [M, 2]  into the LossTokens
    weight       float [M]     every normaliser included; 0 only measures
    divergence   "reverse_kl": KL(p ‖ q); "forward_kl": KL(q ‖ p); "jsd": (KL(p ‖ m) + KL(q ‖ m))/2 with m = (p + q)/2
    second_grad  whether the second token's row gets a gradient too; by default it is the teacher
    """

    index: torch.Tensor
    weight: torch.Tensor
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    second_grad: bool = False

    def check(self) -> None:
        """PactError if kind or shapes are wrong."""
        if self.divergence not in DIVERGENCES:
            raise PactError(f"pairs.divergence='{self.divergence}' is not known; use one of {', '.join(DIVERGENCES)}")
        if self.index.ndim != 2 or self.index.shape[1] != 2 or self.weight.shape != self.index.shape[:1]:
            raise PactError(
                f"pairs: index {list(self.index.shape)} and weight {list(self.weight.shape)} must be [M, 2] and [M]"
            )

    def check_index(self, tokens: int) -> None:
        """PactError if the pairs do not fit a table of so many tokens. Called by the custom op, see `check_targets`."""
        if ((self.index < 0) | (self.index >= tokens)).any():
            raise PactError(f"pairs.index points outside the table of {tokens} tokens")
        if len(self.index.unique()) < self.index.numel():
            raise PactError("pairs.index: a token is in two pairs; add the token to the table once more")

    def order(self, tokens: int) -> torch.Tensor:
        """[tokens] the tokens with those of a pair next to each other, pairs first."""
        alone = torch.ones(tokens, dtype=torch.bool, device=self.index.device)
        alone[self.index] = False
        return torch.cat([self.index.flatten(), alone.nonzero().squeeze(1)])


def pairing(pairs: TokenPairs, chunk: slice, head: ChunkedHead) -> Pairing:
    """How the rows of a chunk are coupled; after head.forward. Tokens lie in the order of `TokenPairs.order`."""
    count = chunk.stop - chunk.start
    place = torch.arange(count, device=pairs.index.device)
    paired = max(0, min(2 * len(pairs.index) - chunk.start, count))
    partner = torch.where(place < paired, place ^ 1, -1)  # chunks begin at even places
    kind = JSD if pairs.divergence == "jsd" else KL
    divergence = head.divergence(partner, kind)
    weight = divergence.new_zeros(count)
    weight[:paired] = pairs.weight[chunk.start // 2 : (chunk.start + paired) // 2].repeat_interleave(2).to(weight.dtype)
    first, second = weight * (place % 2 == 0), weight * (place % 2 == 1) * pairs.second_grad
    none = torch.zeros_like(weight)
    if kind == JSD:
        return Pairing(kind, partner, divergence, own=(first + second) / 2, cross=none)
    if pairs.divergence == "reverse_kl":
        return Pairing(kind, partner, divergence, own=first, cross=second)
    return Pairing(kind, partner, divergence, own=second, cross=first)


def pair_values(coupled: Pairing | None, pairs: TokenPairs | None, like: torch.Tensor) -> torch.Tensor:
    """[n] the divergence of every pair, at the place of its first token; NaN elsewhere."""
    values = torch.full_like(like, torch.nan)
    if coupled is None or pairs is None:
        return values
    count = int((coupled.partner >= 0).sum())
    first, second = coupled.divergence[0:count:2], coupled.divergence[1:count:2]
    values[0:count:2] = {"reverse_kl": first, "forward_kl": second, "jsd": (first + second) / 2}[pairs.divergence]
    return values
