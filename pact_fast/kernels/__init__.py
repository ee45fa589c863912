"""Kernels that need torch alone: log-probs and losses of a language-model head without the [N, V] logits.

Public: the names in `__all__`. `head/` holds the log-probs and losses, `decoder/` pointwise kernels for the decoder on CPU,
`runtime/` what they share. Documentation: docs/kernels.md, docs/loss.md.
"""

from pact_fast.components import LossContext
from pact_fast.kernels import token_losses
from pact_fast.kernels.head.cross_entropy import linear_cross_entropy
from pact_fast.kernels.head.divergence import TokenPairs
from pact_fast.kernels.head.head_of import Head, head_of
from pact_fast.kernels.head.logprob import LogProbs, linear_logprob
from pact_fast.kernels.head.loss import LossOutput, pact_loss
from pact_fast.kernels.head.objective import PolicyLoss, PolicyTerm, policy_loss
from pact_fast.kernels.head.stats import summarise
from pact_fast.kernels.head.tokens import LossTokens
from pact_fast.kernels.head.vocab_parallel import vocab_parallel_logprob
from pact_fast.kernels.runtime.backends import backends
from pact_fast.kernels.runtime.scratch import release_memory

__all__ = [
    "Head",
    "LogProbs",
    "LossContext",
    "LossOutput",
    "LossTokens",
    "PolicyLoss",
    "PolicyTerm",
    "TokenPairs",
    "backends",
    "head_of",
    "linear_cross_entropy",
    "linear_logprob",
    "pact_loss",
    "policy_loss",
    "release_memory",
    "summarise",
    "token_losses",
    "vocab_parallel_logprob",
]
