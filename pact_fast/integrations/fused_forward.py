"""A model's forward that makes log-probs or a loss of hidden states, in front of the one that makes logits."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pact_fast.integrations.one_gradient import OneGradient
from pact_fast.kernels import LossTokens, head_of, linear_logprob, pact_loss
from pact_fast.kernels.head.logit_transform import causal_lm_of, head_layer

Forward = Callable[..., Any]


def replace_forward(model: Any, make: Callable[[Any, Forward], Forward]) -> Callable[[], None]:
    """Put `make(causal_lm, its forward)` in front of the causal LM's forward; returns the function that removes it.

    The signature stays, because trainers and `generate` read it. With ranks of ZeRO-3, all of them call it. Raises PactError
    if the model's head is not supported.
    """
    causal_lm = causal_lm_of(model)
    with _gathered(head_layer(causal_lm)):
        head_of(causal_lm)  # the reason why not, now; what it finds is kept for forward passes
    before = causal_lm.forward
    forward = functools.wraps(getattr(before, "__func__", before))(make(causal_lm, before))
    forward.own = before  # type: ignore[attr-defined]
    had_own = "forward" in vars(causal_lm)
    causal_lm.forward = types.MethodType(lambda self, *args, **options: forward(*args, **options), causal_lm)
    functools.update_wrapper(causal_lm.forward.__func__, forward)

    def remove() -> None:
        if had_own:
            causal_lm.forward = before
        else:
            del causal_lm.forward

    return remove


def _gathered(layer: Any) -> AbstractContextManager[Any]:
    """Whole parameters of a layer, where ZeRO-3 has partitioned them as the model was loaded."""
    split = [parameter for parameter in layer.parameters() if hasattr(parameter, "ds_shape")]
    if not split:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(split)


def summed_logprobs(hidden: torch.Tensor, head: Any, target: torch.Tensor, **options: Any) -> tuple[Any, Any, Any]:
    """(log-probs, entropies, statistics) [N] for a loss that is a multiple of Σ log-prob: 6NDV FLOPs instead of 8NDV."""
    tokens = LossTokens(torch.arange(len(target), device=target.device), target, sft_weight=1.0)
    out = pact_loss(head.input(hidden), head.weight, tokens, **head.options, **options)
    formed = -torch.ones_like(out.logprob), torch.zeros_like(out.entropy)
    return *OneGradient.apply(out.loss, out.logprob, out.entropy, *formed), out.row_statistics


def separate_logprobs(hidden: torch.Tensor, head: Any, target: torch.Tensor, **options: Any) -> tuple[Any, Any, Any]:
    """(log-probs, entropies, statistics) [N] for any loss."""
    out = linear_logprob(head.input(hidden), head.weight, target, entropy=True, **head.options, **options)
    return out.logprob, out.entropy, out.statistics
