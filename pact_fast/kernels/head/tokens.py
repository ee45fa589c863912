"""The loss table: one row per supervised token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pact_fast.components import Component, LossContext
from pact_fast.errors import PactError
from pact_fast.kernels.head.batch_columns import BatchColumns

COMPONENTS = len(Component)
Column = torch.Tensor | float


@dataclass(init=False)
class LossTokens:
    """The loss table of N supervised tokens. All fields are [N], on the device of the hidden states.

    row              int64    index of the hidden state that predicts the token; several tokens may share one
    target           int64    token id
    context          int64    LossContext under which the token is scored
    component        int64    pact_fast.components.Component; for statistics
    sequence         int64    id of the sequence; gspo takes one ratio per (sequence, context). None: not known
    advantage        float32  A; ignored where rl_weight = 0
    old_logprob      float32  log π_old under the token's own context; NaN: the current policy, ratio exactly 1
    rl_weight        float    weight of the policy loss, every normaliser included (float32 or float64)
    sft_weight       float    weight of the SFT loss, −log π by default, every normaliser included (float32 or float64)
    ref_logprob      float32  log π_ref, for the k3 KL term; None: no term
    sampler_logprob  float32  log-prob with which the token was sampled, for `importance_cap`; NaN: importance weight 1
    kl_weight        float    weight of the KL term, every normaliser included; None: rl_weight
    entropy_weight   float    weight of the entropy bonus, every normaliser included; None: rl_weight

    Only row and target are required, and the columns that the loss reads: advantage and rl_weight for a policy loss,
    sft_weight for SFT. A table without weights only measures. A number stands for [N] times that number.
    """

    row: torch.Tensor
    target: torch.Tensor
    context: torch.Tensor
    component: torch.Tensor
    sequence: torch.Tensor | None
    advantage: torch.Tensor
    old_logprob: torch.Tensor
    rl_weight: torch.Tensor
    sft_weight: torch.Tensor
    ref_logprob: torch.Tensor | None
    sampler_logprob: torch.Tensor | None
    kl_weight: torch.Tensor | None
    entropy_weight: torch.Tensor | None

    def __init__(
        self,
        row: torch.Tensor,
        target: torch.Tensor,
        context: Column = LossContext.PROMPT,
        component: Column = Component.ANSWER,
        sequence: torch.Tensor | None = None,
        advantage: Column | None = None,
        old_logprob: Column = float("nan"),
        rl_weight: Column | None = None,
        sft_weight: Column = 0.0,
        ref_logprob: Column | None = None,
        sampler_logprob: Column | None = None,
        kl_weight: Column | None = None,
        entropy_weight: Column | None = None,
    ):
        """Integer ids become int64, integer and boolean weights float32; weights given as numbers are float64.

        Raises:
            PactError: Columns differ in length or have the wrong type, or rl_weight and advantage are not given together.
        """
        if (advantage is None) != (rl_weight is None):
            given, missing = ("rl_weight", "advantage") if advantage is None else ("advantage", "rl_weight")
            raise PactError(
                f"LossTokens: {given} without {missing}; give both, or advantage=0 for KL and entropy alone"
            )
        if row.ndim != 1:
            raise PactError(f"LossTokens: row {list(row.shape)} must be [N], one hidden state per supervised token")
        self.row = _int_column("row", row, row)
        self.target = _int_column("target", target, row)
        self.context = _int_column("context", context, row)
        self.component = _int_column("component", component, row)
        self.sequence = None if sequence is None else _int_column("sequence", sequence, row)
        self.advantage = _float_column("advantage", 0.0 if advantage is None else advantage, row)
        self.old_logprob = _float_column("old_logprob", old_logprob, row)
        self.rl_weight = _float_column("rl_weight", 0.0 if rl_weight is None else rl_weight, row, torch.float64)
        self.sft_weight = _float_column("sft_weight", sft_weight, row, torch.float64)
        self.ref_logprob = None if ref_logprob is None else _float_column("ref_logprob", ref_logprob, row)
        self.sampler_logprob = (
            None if sampler_logprob is None else _float_column("sampler_logprob", sampler_logprob, row)
        )
        self.kl_weight = None if kl_weight is None else _float_column("kl_weight", kl_weight, row, torch.float64)
        self.entropy_weight = (
            None if entropy_weight is None else _float_column("entropy_weight", entropy_weight, row, torch.float64)
        )

    @staticmethod
    def from_batch(
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        advantages: Column | None = None,
        old_logprobs: torch.Tensor | None = None,
        *,
        ref_logprobs: torch.Tensor | None = None,
        sampler_logprobs: torch.Tensor | None = None,
        components: torch.Tensor | None = None,
        normalise: str | float = "token",
        count: float | None = None,
    ) -> LossTokens:
        """The table of a padded batch whose hidden states [B, L, D] are passed as `hidden.flatten(0, 1)`.

        The token at position t is predicted by the hidden state at t − 1; a first token has no loss. Columns may be
        shorter than the ids: [B, C] holds the last C tokens of every row, as completion masks and log-probs do.

        Args:
            input_ids: int64 [B, L] token ids, padded on either side.
            mask: [B, C], nonzero where a token has a loss.
            advantages: Number, [B] (one per sequence) or [B, C]. None: SFT, −log π with the same weights.
            old_logprobs: [B, C] log π_old. None: the current policy, ratio 1.
            ref_logprobs: [B, C] log π_ref, for `kl_coef`.
            sampler_logprobs: [B, C] log-probs with which the tokens were sampled, for `importance_cap`.
            components: int64 [B, C] `Component`, for statistics.
            normalise: "token": every token weighs the same (1/number of tokens). "sequence": every sequence does
                (1/(B·its number of tokens)). A number: 1/(B·number), the constant length of Dr. GRPO
                (arXiv 2503.20783).
            count: For micro-batches, the number of tokens ("token") or of sequences B (else) in the whole optimizer
                step. None: those of this batch; sequences without a token count.

        Raises:
            PactError: Shapes do not fit, or `normalise` is unknown.
        """
        batch = BatchColumns(input_ids, mask)
        weight = batch.weight(normalise, count)
        policy = advantages is not None
        return LossTokens(
            row=batch.row,
            target=batch.pick("input_ids", input_ids),
            context=LossContext.PROMPT if policy else LossContext.EXPERT,
            component=Component.ANSWER if components is None else batch.pick("components", components),
            sequence=batch.sequence,
            advantage=batch.pick("advantages", advantages) if isinstance(advantages, torch.Tensor) else advantages,
            old_logprob=float("nan") if old_logprobs is None else batch.pick("old_logprobs", old_logprobs),
            rl_weight=weight if policy else None,
            sft_weight=0.0 if policy else weight,
            ref_logprob=None if ref_logprobs is None else batch.pick("ref_logprobs", ref_logprobs),
            sampler_logprob=None if sampler_logprobs is None else batch.pick("sampler_logprobs", sampler_logprobs),
        )

    def __len__(self) -> int:
        return self.row.shape[0]

    def columns(self) -> list[torch.Tensor | None]:
        """All fields in order."""
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    def named_columns(self) -> list[tuple[str, torch.Tensor]]:
        """(name, column) of the fields that are not None."""
        named = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        return [(name, column) for name, column in named if column is not None]

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
        """Concatenate; an optional field must be present in all parts or in none (else PactError)."""
        joined: dict[str, Any] = {}
        for name in (f.name for f in dataclasses.fields(LossTokens)):
            columns = [getattr(part, name) for part in parts]
            missing = sum(column is None for column in columns)
            if 0 < missing < len(columns):
                raise PactError(
                    f"LossTokens.cat: {missing} of {len(columns)} tables have no {name}; fill it, or drop it"
                )
            joined[name] = None if missing else torch.cat(columns)
        return LossTokens(**joined)


def _int_column(name: str, column: Column, row: torch.Tensor) -> torch.Tensor:
    """The column as int64 [N]."""
    column = _full_column(name, column, row, torch.int64)
    if column.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise PactError(f"LossTokens: {name} is {str(column.dtype).removeprefix('torch.')}; it must be an integer type")
    return column.to(torch.int64)


def _float_column(name: str, column: Column, row: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The column as floating-point [N]; dtype: of a number."""
    column = _full_column(name, column, row, dtype)
    if column.is_complex():
        raise PactError(f"LossTokens: {name} is complex; it must be a floating-point type")
    return column if column.is_floating_point() else column.to(torch.float32)


def _full_column(name: str, column: Column, row: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The column [N]; numbers and 0-d tensors are repeated."""
    if not isinstance(column, torch.Tensor):
        return torch.full(row.shape, column, dtype=dtype, device=row.device)
    if column.ndim == 0:
        return column.to(row.device).repeat(row.shape[0])
    if column.shape != row.shape:
        raise PactError(
            f"LossTokens: {name} {list(column.shape)} must be a number or have one entry per row [{len(row)}]"
        )
    return column
