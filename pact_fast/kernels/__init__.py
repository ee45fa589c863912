"""Kernels, usable alone: log-probs and the dual loss reduction of a language-model head, never holding [N, V]."""

from pact_fast.components import LossContext
from pact_fast.kernels.head.divergence import TokenPairs
from pact_fast.kernels.head.logprob import LogProbs, linear_logprob
from pact_fast.kernels.head.loss import LossOutput, pact_loss
from pact_fast.kernels.head.stats import summarise
from pact_fast.kernels.head.tokens import LossTokens
from pact_fast.kernels.runtime.backends import backends
from pact_fast.kernels.runtime.scratch import release_memory

__all__ = [
    "LogProbs",
    "LossContext",
    "LossOutput",
    "LossTokens",
    "TokenPairs",
    "backends",
    "linear_logprob",
    "pact_loss",
    "release_memory",
    "summarise",
]
