"""The gradient of the hidden states: sums over the tokens that read a row, exact zeros in rows that no token reads."""

from __future__ import annotations

import torch


class HiddenGradient:
    """dL/dhidden [T, D] of tokens that read some of the T rows, possibly several tokens the same row.

    In 16-bit types only rows that are read get an accumulator; the rest of the result is never written twice.

    Args:
        shape: (T, D).
        row: int64 [N], the row that each token reads.
        total: dtype of the sums.
        result: dtype of the result.
    """

    def __init__(self, shape: torch.Size, row: torch.Tensor, total: torch.dtype, result: torch.dtype):
        self._shape, self._dtype, self._rows, self._slot = shape, result, None, row
        rows = shape[0]
        if result != total:
            self._rows, self._slot = row.unique(return_inverse=True)
            rows = len(self._rows)
        self._sums = torch.zeros(rows, shape[1], dtype=total, device=row.device)

    def add(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [m, D] to the rows of tokens [m], in a fixed order."""
        slot = self._slot[tokens]
        if self._sums.is_cuda:
            self._sums.index_put_((slot,), values, accumulate=True)  # sorts; index_add_ uses atomics on CUDA
        else:
            self._sums.index_add_(0, slot, values)

    def result(self) -> torch.Tensor:
        """[T, D]."""
        if self._rows is None:
            return self._sums
        gradient = torch.zeros(self._shape, dtype=self._dtype, device=self._sums.device)
        gradient[self._rows] = self._sums.to(self._dtype)
        return gradient
