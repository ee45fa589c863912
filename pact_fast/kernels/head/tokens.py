"""The loss table: one row per supervised token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pact_fast.components import Component

COMPONENTS = len(Component)


@dataclass
class LossTokens:
    """The loss table of N supervised tokens. All fields are [N], on the device of the hidden states.

    row              int64    index of the hidden state that predicts the token; several tokens may share one
    target           int64    token id
    context          int64    LossContext under which the token is scored
    component        int64    pact_fast.components.Component; for statistics
    sequence         int64    0 ≤ id < number of sequences; gspo takes one ratio per (sequence, context)
    advantage        float32  A; ignored where rl_weight = 0
    old_logprob      float32  log π_old under the token's own context; NaN: the current policy, ratio exactly 1
    rl_weight        float    weight of the policy loss, every normaliser included (float32 or float64)
    sft_weight       float    weight of −log π, every normaliser included (float32 or float64)
    ref_logprob      float32  log π_ref, for the k3 KL term; None: no term
    sampler_logprob  float32  log-prob with which the token was sampled, for `is_cap`; NaN: importance weight 1
    """

    row: torch.Tensor
    target: torch.Tensor
    context: torch.Tensor
    component: torch.Tensor
    sequence: torch.Tensor
    advantage: torch.Tensor
    old_logprob: torch.Tensor
    rl_weight: torch.Tensor
    sft_weight: torch.Tensor
    ref_logprob: torch.Tensor | None = None
    sampler_logprob: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.row.shape[0]

    def columns(self) -> list[torch.Tensor | None]:
        """All fields in order."""
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    def to(self, device: torch.device | str) -> LossTokens:
        """The table on another device."""
        return self._map(lambda t: t.to(device))

    def select(self, index: torch.Tensor) -> LossTokens:
        """The tokens at `index` (int64 or bool [N])."""
        return self._map(lambda t: t[index])

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> LossTokens:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        mapped: dict[str, Any] = {k: None if v is None else fn(v) for k, v in values.items()}
        return LossTokens(**mapped)

    @staticmethod
    def cat(parts: list[LossTokens]) -> LossTokens:
        """Concatenate; an optional field must be present in all parts or in none."""
        names = [f.name for f in dataclasses.fields(LossTokens)]
        columns: dict[str, Any] = {name: [getattr(part, name) for part in parts] for name in names}
        joined: dict[str, Any] = {k: None if v[0] is None else torch.cat(v) for k, v in columns.items()}
        return LossTokens(**joined)
