"""Columns of a loss table from the [B, L] tensors of a padded batch."""

from __future__ import annotations

import torch

from pact_fast.errors import PactError


class BatchColumns:
    """The N tokens of a padded batch that have a loss, and their entries in tensors of the batch.

    row       int64 [N]  index into `hidden.flatten(0, 1)` of the hidden state that predicts the token
    sequence  int64 [N]  row of the batch

    Args:
        input_ids: [B, L].
        mask: [B, C], nonzero where a token has a loss; the last C tokens of every row.

    Raises:
        PactError: Shapes do not fit.
    """

    def __init__(self, input_ids: torch.Tensor, mask: torch.Tensor):
        if input_ids.ndim != 2:
            raise PactError(f"input_ids {list(input_ids.shape)} must be [B, L]")
        self._batch, self._length = input_ids.shape
        self._check("mask", mask)
        kept, start = mask != 0, self._length - mask.shape[1]
        if not start and self._length:
            kept = kept.clone()
            kept[:, 0] = False  # no hidden state predicts a first token
        self.sequence, position = kept.nonzero(as_tuple=True)
        self._position = position + start
        self.row = self.sequence * self._length + self._position - 1

    def pick(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """[N] entries of `values`: [B], [B, C] with the last C tokens of every row, or 0-d (returned as it is).

        Raises:
            PactError: The shape does not fit, or a token with a loss is not among the last C.
        """
        if values.ndim == 0:
            return values
        if values.shape == (self._batch,):
            return values[self.sequence]
        self._check(name, values)
        start = self._length - values.shape[1]
        if start > 1 and bool((self._position < start).any()):
            raise PactError(
                f"{name} {list(values.shape)} has no entry for some tokens in mask; give the last {self._length}"
            )
        return values[self.sequence, self._position - start]

    def weight(self, normalise: str | float, count: float | None) -> torch.Tensor:
        """float64 [N] weight of each token; see `LossTokens.from_batch`."""
        tokens = len(self.sequence)
        count = None if count is None else float(count)
        if normalise == "token":
            return torch.full(
                (tokens,), 1.0 / (count or max(tokens, 1)), dtype=torch.float64, device=self.sequence.device
            )
        sequences = count or self._batch
        if normalise == "sequence":
            lengths = self.sequence.bincount(minlength=self._batch)
            return 1.0 / (sequences * lengths[self.sequence].double())
        if isinstance(normalise, str) or not normalise > 0:
            raise PactError(f"normalise={normalise!r} must be 'token', 'sequence' or a positive length in tokens")
        return torch.full((tokens,), 1.0 / (sequences * normalise), dtype=torch.float64, device=self.sequence.device)

    def _check(self, name: str, values: torch.Tensor) -> None:
        if values.ndim != 2 or len(values) != self._batch or values.shape[1] > self._length:
            raise PactError(
                f"{name} {list(values.shape)} must be [{self._batch}, C] with C ≤ {self._length}, as input_ids"
            )
