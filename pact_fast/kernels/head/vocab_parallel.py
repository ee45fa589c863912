"""vocab_parallel_logprob: log-probs under a head whose vocabulary is split over the ranks of a group (tensor parallelism).

Each rank reduces its columns of a row to four numbers: maximum m, s = Σ exp(z − m), w = Σ exp(z − m)·(z − m), and the
target's logit. They are gathered and merged in the order of the ranks, so that all ranks have the same bits:

    M = max m    S = Σ s·exp(m − M)    W = Σ exp(m − M)·(w + (m − M)·s)    log p = z − M − log S    H = log S − W/S
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pact_fast.errors import PactError
from pact_fast.kernels.head.checks import check_head, check_present, check_targets, check_temperature, per_token
from pact_fast.kernels.head.chunked import balanced_chunk_rows, max_chunk_rows
from pact_fast.kernels.head.gemm import accumulation_dtype, autocast_dtype, make_gemms
from pact_fast.kernels.head.logprob import (
    LogProbs,
    as_operands,
    fold_logit_scale,
    gradient_dtype,
    refuse_second_derivatives,
)
from pact_fast.kernels.runtime.backends import resolve
from pact_fast.kernels.runtime.scratch import Scratch, padded_nbytes

BUFFERS = 5  # [rows, V] tensors at a time: the logits, and what plain torch allocates beside them


def vocab_parallel_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: Any,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    backend: str = "auto",
) -> LogProbs:
    """`linear_logprob` for a weight whose rows are split over the ranks of `group`; all ranks call, with the same tokens.

    Every rank gets the same log-probs and entropies, the gradient of its own rows of weight and bias, and the whole gradient
    of hidden. The loss must be the same on all ranks, or a rank's share of tokens would be counted once per rank.

    Args:
        hidden: [N, D], the same on all ranks.
        weight: [V_k, D], this rank's rows; the ranks hold consecutive parts of the vocabulary, of any sizes.
        targets: [N] int64 ids in the whole vocabulary.
        group: A `torch.distributed` process group.
        bias: [V_k], this rank's part.
        temperature: Divides the logits; a number or [N].
        softcap: Soft-cap of the logits; None: no cap.
        logit_scale: Positive factor of hWᵀ + b, before the soft-cap.
        entropy: Whether to return the entropy.
        backend: "auto", or one of `backends()`, for the GEMMs; the softmax passes are plain torch.

    Raises:
        PactError: As `linear_logprob`.
    """
    check_head(hidden, weight, bias)
    if targets.shape != hidden.shape[:1]:
        raise PactError(f"targets {list(targets.shape)} must be one token id per row of hidden {list(hidden.shape)}")
    temperatures, cap = fold_logit_scale(logit_scale, per_token(temperature, targets), softcap)
    check_temperature(temperatures)
    settings = _Settings(group, cap, backend, autocast_dtype(hidden, weight))
    logprob, entropies = _VocabParallel.apply(hidden, weight, bias, targets, temperatures, settings)
    return LogProbs(logprob, entropies if entropy else None)


class _Settings(NamedTuple):
    group: Any
    softcap: float | None
    backend: str
    operand_dtype: torch.dtype | None


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, targets, temperature, settings):
        first, total = _place(len(weight), hidden.device, settings.group)
        check_targets(targets, total)
        local = targets - first
        local = torch.where((local >= 0) & (local < len(weight)), local, -1)
        with torch.autocast(hidden.device.type, enabled=False):
            shard = _Shard(hidden, weight, bias, len(hidden), settings, (False, False, False))
            parts = [shard.reduce(hidden[c], local[c], temperature[c]) for c in shard.chunks()]
        top, log_sum, entropy, target = _merge(_gathered(torch.cat(parts, 1), settings.group))
        logprob = target - top - log_sum
        ctx.save_for_backward(hidden, weight, bias, local, temperature, logprob, top, log_sum, entropy)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, g, h):
        refuse_second_derivatives()
        hidden, weight, bias, local, temperature, logprob, *stats = ctx.saved_tensors
        check_present(hidden, weight, bias)
        needs, settings = ctx.needs_input_grad[:3], ctx.settings
        g = torch.zeros_like(logprob) if g is None else g
        h = torch.zeros_like(logprob) if h is None else h
        rows = (g.ne(0) | h.ne(0)).nonzero().squeeze(1)
        with torch.autocast(hidden.device.type, enabled=False):
            shard = _Shard(hidden, weight, bias, len(rows), settings, needs)
            # each rank knows the part of its own columns; their sum is the gradient
            dx = torch.zeros(len(rows), hidden.shape[1], dtype=logprob.dtype, device=hidden.device)
            for chunk in shard.chunks():
                at = rows[chunk]
                of_rows = [t[at] for t in (logprob, *stats, g, h)]
                part = shard.backward(hidden[at], local[at], temperature[at], *of_rows)
                if part is not None:
                    dx[chunk] = part
        d_hidden = None
        if needs[0]:
            torch.distributed.all_reduce(dx, group=settings.group)
            d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            d_hidden[rows] = dx.to(hidden.dtype)
        d_weight, d_bias = shard.weight_grad(), shard.d_bias
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(gradient_dtype(weight)).to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None, None, None,
        )  # fmt: skip


class _Shard:
    """This rank's columns, in chunks of rows: `reduce` for the forward pass, `backward`, which computes the logits again."""

    def __init__(self, hidden, weight, bias, total, settings, grads):
        x, w = as_operands(settings.operand_dtype, hidden, weight)
        dtype = accumulation_dtype(x, w)
        backend = resolve(settings.backend, x.device, torch.promote_types(x.dtype, w.dtype))
        self._gemms = make_gemms(backend, x, w, grads[1])
        self._bias = None if bias is None else bias.detach().to(dtype)
        self._softcap, self._grads, self._total = settings.softcap, grads, total
        self.d_bias = torch.zeros(len(w), dtype=dtype, device=w.device) if grads[2] and bias is not None else None
        self._rows = balanced_chunk_rows(total, max_chunk_rows(len(w), BUFFERS * len(w) * dtype.itemsize, w.device))
        shape = self._rows, len(w)
        self._scratch = Scratch(padded_nbytes(shape, dtype) + self._gemms.scratch, w.device)
        self._gemms.bind_scratch(self._scratch)
        self._buffer = self._scratch.empty(shape, dtype)

    def chunks(self) -> list[slice]:
        return [slice(i, min(i + self._rows, self._total)) for i in range(0, max(self._total, 1), self._rows)]

    def _logits(self, x: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x in the operands' dtype, its final logits [n, V_k])."""
        x, z = x.to(self._gemms.operand_dtype), self._buffer[: len(x)]
        self._gemms.logits(x, z)
        if self._bias is not None:
            z.add_(self._bias)
        if self._softcap:
            z.div_(self._softcap).tanh_().mul_(self._softcap)
        return x, z.div_(temperature.to(z.dtype)[:, None])

    def reduce(self, x: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """[4, n]: m, s, w and the target's logit, −inf if it is another rank's (target −1)."""
        _, z = self._logits(x, temperature)
        own = z.gather(1, target.clamp(min=0)[:, None])[:, 0]
        top = z.amax(1)
        shifted = z.sub_(top[:, None])
        e = shifted.exp()
        sums = e.sum(1), (e.mul_(shifted)).sum(1)
        return torch.stack([top, *sums, torch.where(target >= 0, own, -torch.inf)])

    def backward(self, x, target, temperature, logprob, top, log_sum, entropy, g, h) -> torch.Tensor | None:
        """This shard's part of dL/dx [n, D], None if not needed; dL/dW and dL/db are added up."""
        if not len(x):
            return None
        x, z = self._logits(x, temperature)
        own, mine = target.clamp(min=0)[:, None], target >= 0
        log_p = z - top[:, None] - log_sum[:, None]
        p = log_p.exp()
        dz = -g[:, None] * p
        # 1 − p by expm1: where p → 1, g − g·p would lose every digit
        at_target = torch.where(mine, -g * logprob.expm1(), dz.gather(1, own)[:, 0])
        dz.scatter_(1, own, at_target[:, None])
        dz -= h[:, None] * p * (log_p + entropy[:, None])
        t = temperature.to(z.dtype)[:, None]
        if self._softcap:
            dz *= 1.0 - (z * (t / self._softcap)).square()
        scale = self._gemms.scale(torch.stack([g, h]))
        out = self._gemms.dz_view(z)
        out.copy_(dz * (scale / t))
        if self.d_bias is not None:
            self.d_bias.add_((dz / t).sum(0))
        return self._gemms.backward(out, x, scale, self._grads[0])

    def weight_grad(self) -> torch.Tensor | None:
        return self._gemms.weight_grad()


def _merge(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M, log S, H, target's logit) [N] of the ranks' parts [ranks, 4, N]."""
    m, s, w, target = parts.unbind(1)
    top = m.amax(0)
    shift = m - top
    scale = shift.exp()
    total = (s * scale).sum(0)
    weighted = (scale * (w + shift * s)).sum(0)
    log_sum = total.log()
    return top, log_sum, log_sum - weighted / total, target.amax(0)


def _gathered(part: torch.Tensor, group: Any) -> torch.Tensor:
    """[ranks, *part.shape], in the order of the ranks."""
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts)


def _place(rows: int, device: torch.device, group: Any) -> tuple[int, int]:
    """(first id of this rank's rows, size of the vocabulary)."""
    sizes = _gathered(torch.tensor([rows], device=device), group).flatten().tolist()
    return sum(sizes[: torch.distributed.get_rank(group)]), sum(sizes)
