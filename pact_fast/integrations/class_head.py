"""The forward of a host's own class of head, by these kernels: log-probs and entropies of all tokens, without logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pact_fast.integrations.self_check import check_head, due
from pact_fast.kernels import Head, linear_logprob


def replace_method(
    owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Put `make(the class's method)` in its place; returns the function that undoes it."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    return lambda: setattr(owner, name, before)


class ClassHead:
    """Scores tokens for a host whose head is a class that gets hidden states, weight and labels.

    Raises PactError if kernels and full logits disagree on the first batch that is differentiated.
    """

    def __init__(self, host: str):
        self._host, self._checked = host, False

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        temperature: float | torch.Tensor = 1.0,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs, entropies) in the shape of labels [...]; hidden [..., D]; temperature: a number, or shaped as labels."""
        rows, targets = hidden.flatten(0, -2), labels.flatten().long()
        if hasattr(weight, "full_tensor"):  # a head that FSDP2 shards by itself
            weight = weight.full_tensor()
        if isinstance(temperature, torch.Tensor) and temperature.numel() > 1:
            temperature = temperature.flatten().float()
        self.check(rows, weight, targets, float(torch.as_tensor(temperature).flatten()[0]), softcap)
        out = linear_logprob(rows, weight, targets, temperature=temperature, softcap=softcap, entropy=True)
        assert out.entropy is not None
        return out.logprob.view(labels.shape), out.entropy.view(labels.shape)

    def check(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
        softcap: float | None = None,
    ) -> bool:
        """Whether this is the first batch; it is compared with full logits. rows [N, D], targets [N], −100: no token."""
        index = (targets != -100).nonzero().squeeze(1)
        if not torch.is_grad_enabled() or not due(self._checked, len(index)):
            return False
        self._checked = True
        layer = functools.partial(torch.nn.functional.linear, weight=weight)
        check_head(layer, Head(weight, softcap=softcap), rows, index, targets[index], temperature, self._host)
        return True
