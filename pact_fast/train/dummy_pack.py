"""A dummy pack: one token with zero loss weight, run by an idle rank so that collectives stay matched.

Under ZeRO and sequence parallelism, forward and backward contain collectives. A rank that has no pack in a micro-step, or
no supervised token in its rows, runs a dummy; it adds nothing to loss or gradients.
"""

from __future__ import annotations

import numpy as np
import torch

from pact_fast.batch.packing import PackedBatch, pack
from pact_fast.batch.tree import TokenTree
from pact_fast.kernels.head.tokens import LossTokens


def dummy_pack(tokens: int) -> PackedBatch:
    """A pack of `tokens` zeros (one for each rank of a sequence-parallel group)."""
    tree = TokenTree()
    tree.add(np.zeros(tokens, np.int64))
    return pack([tree], max_tokens=tokens)[0]


def dummy_tokens(reference: bool) -> LossTokens:
    """A loss table of one row with zero weights. `reference`: it has a column of reference log-probs."""
    integer, real = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    return LossTokens(
        row=integer, target=integer, context=integer, component=integer, sequence=integer, advantage=real,
        old_logprob=real, rl_weight=real.double(), sft_weight=real.double(),
        ref_logprob=real if reference else None, sampler_logprob=real,
    )  # fmt: skip
