"""The language-model head on a few rows at a time, so that logits of all rows never exist together."""

from __future__ import annotations

from collections.abc import Iterator

import torch

LOGITS_BUDGET = 1 << 30  # bytes of all [rows, V] buffers together
CACHED_LOGITS = 4 << 20  # bytes of one buffer; on CPU, chunks beyond the cache only cost bandwidth
EFFICIENT_ROWS = 512  # fewer rows than this make the matrix products slow


def accumulation_dtype(hidden: torch.Tensor) -> torch.dtype:
    """fp64 for fp64 input, else fp32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunk_rows(vocab: int, row_bytes: int, device: torch.device) -> int:
    """Rows per chunk. `row_bytes`: what one row takes in all [rows, V] buffers."""
    rows = LOGITS_BUDGET // row_bytes
    if device.type == "cpu":
        rows = min(rows, max(EFFICIENT_ROWS, CACHED_LOGITS // (4 * vocab)))
    return max(1, rows)


class ChunkedHead:
    """Log-probs, entropies and their gradients of one chunk of rows after another.

    Computes z = softcap·tanh((xWᵀ + b)/softcap)/temperature in the accumulation dtype and log-softmax over it, and from
    dL/dlogprob and dL/dentropy the gradients: dL/dx is returned per chunk, dL/dW and dL/db add up in `d_weight` and
    `d_bias`. `grads` says which of (x, W, b) need one.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        total: int,
        grads: tuple[bool, bool, bool] = (False, False, False),
    ):
        dtype, vocab = accumulation_dtype(hidden), weight.shape[0]
        buffers = 3 if softcap else 2
        rows = min(max(total, 1), chunk_rows(vocab, buffers * vocab * dtype.itemsize, hidden.device))
        self._total, self._rows = total, rows
        self._weight = weight.detach().to(dtype)
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._softcap = softcap
        self._x_grad, weight_grad, bias_grad = grads
        self.d_weight = torch.zeros_like(self._weight) if weight_grad else None
        self.d_bias = self._weight.new_zeros(vocab) if bias_grad else None
        self._buffers = [self._weight.new_empty(rows, vocab) for _ in range(buffers)]

    def chunks(self) -> Iterator[slice]:
        """The rows in order; one empty chunk when there are none."""
        starts = range(0, max(self._total, 1), self._rows)
        return (slice(start, min(start + self._rows, self._total)) for start in starts)

    def forward(self, x: torch.Tensor, target: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
        """Log-probs [n] of target [n]. x [n, D] in the accumulation dtype, temperature a number or [n]."""
        z, log_p, *rest = (buffer[: len(x)] for buffer in self._buffers)
        torch.mm(x, self._weight.t(), out=z)
        if self._bias is not None:
            z.add_(self._bias)
        if self._softcap:
            self._tanh = torch.tanh(z.div_(self._softcap), out=rest[0])
            torch.mul(self._tanh, self._softcap, out=z)
        if isinstance(temperature, torch.Tensor):
            z.div_(temperature[:, None])
        elif temperature != 1.0:
            z.div_(temperature)
        torch.log_softmax(z, dim=-1, out=log_p)
        self._x, self._target, self._temperature = x, target, temperature
        self._log_p, self._p = log_p, z  # the logits' buffer becomes the probabilities'
        self._entropy: torch.Tensor | None = None
        return log_p.gather(1, target[:, None]).squeeze(1)

    def entropy(self) -> torch.Tensor:
        """Entropies [n] of the chunk; after `forward`, before `backward`."""
        torch.exp(self._log_p, out=self._p)
        self._entropy = -torch.linalg.vecdot(self._p, self._log_p)
        return self._entropy

    def backward(self, g: torch.Tensor, h: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """After `forward` of the same chunk: g [n] = dL/dlogprob, h [n] = dL/dentropy (None: nowhere).

        Returns (active, dx): the places [m] within the chunk whose gradient is not zero, and dL/dx [m, D] there, None
        when not needed. The other places cost no matrix product. With p = softmax(z) and entropy H,

            dL/dz = g·(onehot − p) − h·p·(log p + H).
        """
        active = (g != 0 if h is None else (g != 0) | (h != 0)).nonzero().squeeze(1)
        if not len(active):
            return active, None
        entropy = self.entropy() if self._entropy is None else self._entropy
        dz, log_p, x = self._p, self._log_p, self._x
        g = g / self._temperature
        if h is None:
            dz.mul_(-g[:, None])
        else:
            h = h / self._temperature
            dz.mul_(log_p.add_(entropy[:, None]).mul_(-h[:, None]).sub_(g[:, None]))
        dz.scatter_add_(1, self._target[:, None], g[:, None])
        if self._softcap:
            dz.mul_(self._tanh.square_().neg_().add_(1.0))
        if len(active) < len(x):
            x = x[active]
            dz = torch.index_select(dz, 0, active, out=log_p[: len(active)])
        if self.d_weight is not None:
            self.d_weight.addmm_(dz.t(), x)
        if self.d_bias is not None:
            self.d_bias.add_(dz.sum(0))
        return active, torch.mm(dz, self._weight) if self._x_grad else None
