"""Kernels, usable alone: log-probs and the dual loss reduction of a language-model head, never holding [N, V]."""

from pact_fast.kernels.backend import backends
from pact_fast.kernels.logprob import LogProbs, linear_logprob
from pact_fast.kernels.loss import LossOutput, pact_loss
from pact_fast.kernels.memory import release_memory
from pact_fast.kernels.pairs import TokenPairs
from pact_fast.kernels.stats import summarise
from pact_fast.kernels.tokens import LossTokens, Stream

__all__ = [
    "LogProbs",
    "LossOutput",
    "LossTokens",
    "Stream",
    "TokenPairs",
    "backends",
    "linear_logprob",
    "pact_loss",
    "release_memory",
    "summarise",
]
