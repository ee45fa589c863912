"""One token of each row of logits by inverse CDF, with its log-prob, in one pass over memory (csrc/sample.cpp). CPU only."""

from __future__ import annotations

import functools

import torch

from pact_fast.kernels.runtime import build


def serves(logits: torch.Tensor) -> bool:
    """Whether the kernel samples from these logits."""
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.dim() == 2 and _ready()


def sample(
    logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token of each row whose cumulated probability exceeds its uniform variate; the most probable one if greedy.

    Args:
        logits: fp32 [n, V], as `serves` accepts them.
        temperatures: fp32 [n]; 0 is greedy, and the log-prob is then that of temperature 1.
        uniforms: fp64 [n] in [0, 1).

    Returns:
        (tokens int64 [n], log-probs fp32 [n]). Where logits are NaN, so is the log-prob.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64)
    logprobs = torch.empty(len(logits), dtype=torch.float32)
    _operator()(logits.contiguous(), temperatures, uniforms, tokens, logprobs)
    return tokens, logprobs


@functools.cache
def _ready() -> bool:
    return build.status() == "ready"


@functools.cache  # once, after the library is loaded
def _operator():
    return torch.ops.pact_fast.sample.default
