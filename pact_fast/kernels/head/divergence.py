"""Experimental: divergences between the full next-token distributions of two rows, without storing either.

With the same rollout token under both contexts as a pair (first: prompt-only, second: trace-conditioned) this is the
loss of self-distillation methods (SDFT, OPSD; `algorithms/sdft.py`).
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
    """Experimental: M pairs of tokens whose divergence enters the loss. p, q: softmax of the first and second token's row.

    index        int64 [M, 2]  into the LossTokens; a token may be in one pair only
    weight       float [M]     weight in the loss, every normaliser included; 0 only measures
    divergence   "reverse_kl": KL(p ‖ q); "forward_kl": KL(q ‖ p); "jsd": (KL(p ‖ m) + KL(q ‖ m))/2, m = (p + q)/2
    second_grad  whether the second token's row gets a gradient too; by default it is the teacher and gets none
    """

    index: torch.Tensor
    weight: torch.Tensor
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    second_grad: bool = False

    def check(self) -> None:
        """Raise PactError if the divergence is unknown or shapes do not fit."""
        if self.divergence not in DIVERGENCES:
            raise PactError(f"pairs.divergence='{self.divergence}' is unknown; use one of {', '.join(DIVERGENCES)}")
        if self.index.ndim != 2 or self.index.shape[1] != 2 or self.weight.shape != self.index.shape[:1]:
            raise PactError(
                f"pairs: index {list(self.index.shape)} and weight {list(self.weight.shape)} must be [M, 2] and [M]"
            )

    def check_index(self, tokens: int) -> None:
        """Raise PactError if an index is outside a table of `tokens` rows or occurs twice. Runs inside the custom op."""
        if ((self.index < 0) | (self.index >= tokens)).any():
            raise PactError(f"pairs.index points outside the table of {tokens} tokens")
        if len(self.index.unique()) < self.index.numel():
            raise PactError("pairs.index: a token is in two pairs; add the token to the table once more")

    def order(self, tokens: int) -> torch.Tensor:
        """[tokens] permutation that puts pairs first, the two tokens of a pair side by side."""
        unpaired = torch.ones(tokens, dtype=torch.bool, device=self.index.device)
        unpaired[self.index] = False
        return torch.cat([self.index.flatten(), unpaired.nonzero().squeeze(1)])


def make_pairing(pairs: TokenPairs, chunk: slice, head: ChunkedHead) -> Pairing:
    """The pairs among the rows of a chunk; call after `head.forward`. Tokens are in the order of `TokenPairs.order`."""
    count = chunk.stop - chunk.start
    position = torch.arange(count, device=pairs.index.device)
    paired = max(0, min(2 * len(pairs.index) - chunk.start, count))
    partner = torch.where(position < paired, position ^ 1, -1)  # chunks start at even positions
    kind = JSD if pairs.divergence == "jsd" else KL
    divergence = head.divergence(partner, kind)
    weight = divergence.new_zeros(count)
    weight[:paired] = pairs.weight[chunk.start // 2 : (chunk.start + paired) // 2].repeat_interleave(2).to(weight.dtype)
    first, second = weight * (position % 2 == 0), weight * (position % 2 == 1) * pairs.second_grad
    zero = torch.zeros_like(weight)
    if kind == JSD:
        return Pairing(kind, partner, divergence, own=(first + second) / 2, cross=zero)
    if pairs.divergence == "reverse_kl":
        return Pairing(kind, partner, divergence, own=first, cross=second)
    return Pairing(kind, partner, divergence, own=second, cross=first)


def pair_divergences(pairing: Pairing | None, pairs: TokenPairs | None, like: torch.Tensor) -> torch.Tensor:
    """[n] divergence of each pair, at the position of its first token; NaN elsewhere. n and dtype as `like`."""
    values = torch.full_like(like, torch.nan)
    if pairing is None or pairs is None:
        return values
    count = int((pairing.partner >= 0).sum())
    first, second = pairing.divergence[0:count:2], pairing.divergence[1:count:2]
    values[0:count:2] = {"reverse_kl": first, "forward_kl": second, "jsd": (first + second) / 2}[pairs.divergence]
    return values
