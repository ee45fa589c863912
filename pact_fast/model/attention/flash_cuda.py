"""The flash-attention kernels that torch ships for CUDA, in bf16 and fp16: one variable-length launch per `AttentionCall`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pact_fast.batch.packing import AttentionCall


class _VarlenPlan(NamedTuple):
    """Arguments of the variable-length kernel for one call.

    cu_q   int32 [spans + 1] cumulative numbers of query rows
    cu_k   int32 [spans + 1] cumulative numbers of keys
    max_q  most query rows of a span
    max_k  most keys of a span
    rows   query rows of the call in the pack
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    rows: slice | torch.Tensor


def varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: _VarlenPlan,
    causal: bool,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [Tq, Hq, D], log-sum-exp [Hq, Tq]) of q [Tq, Hq, D] and k, v [Tk, Hkv, D].

    Of sequences with more keys than queries, the last query stands at the last key.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, 0.0, causal, False, scale=scale, **_window(window)
    )  # fmt: skip
    return out, lse


def varlen_backward(
    grad, q, k, v, out, lse, plan: _VarlenPlan, causal: bool, scale: float, window: int | None = None
) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) by the kernel's raw backward, which takes out and log-sum-exp as arguments."""
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # state of the random generator for dropout
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, 0.0, causal, unused, unused, scale=scale,
        **_window(window),
    )  # fmt: skip


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


class CudaFlash:
    """FlashKernel for one packed batch on one device. Key ranges of a call are copied unless they are contiguous."""

    windows = True

    def __init__(self, device: torch.device):
        self._device = device
        self._plans: dict[int, _VarlenPlan] = {}  # by id(call.spans); the same for all layers

    def rows(self, call: AttentionCall) -> slice | torch.Tensor:
        return self._plan(call).rows

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan = self._plan(call)
        out, lse = varlen_forward(_rows_first(q)[plan.rows], _keys(k, call), _keys(v, call), plan, call.causal, scale)
        return out.transpose(0, 1)[None], lse[None]

    def backward(self, grad, q, k, v, out, lse, call, scale, dq, dk, dv):
        plan = self._plan(call)
        dq_rows, dk_rows, dv_rows = varlen_backward(
            _rows_first(grad)[plan.rows].contiguous(), _rows_first(q)[plan.rows], _keys(k, call), _keys(v, call),
            _rows_first(out)[plan.rows].contiguous(), lse[0, :, plan.rows].contiguous(), plan, call.causal, scale,
        )  # fmt: skip
        _rows_first(dq)[plan.rows] += dq_rows
        start = 0
        for _, _, k0, k1 in call.spans:  # key ranges may overlap: one at a time, in a fixed order
            part = slice(start, start + k1 - k0)
            _rows_first(dk)[k0:k1] += dk_rows[part]
            _rows_first(dv)[k0:k1] += dv_rows[part]
            start = part.stop

    def _plan(self, call: AttentionCall) -> _VarlenPlan:
        plan = self._plans.get(id(call.spans))
        if plan is None:
            queries = [s.q1 - s.q0 for s in call.spans]
            keys = [s.k1 - s.k0 for s in call.spans]
            rows: Any = call.contiguous_rows()
            if rows is None:
                rows = torch.cat([torch.arange(s.q0, s.q1, device=self._device) for s in call.spans])
            plan = _VarlenPlan(self._cumulative(queries), self._cumulative(keys), max(queries), max(keys), rows)
            self._plans[id(call.spans)] = plan
        return plan

    def _cumulative(self, lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], device=self._device).cumsum(0).to(torch.int32)


def _rows_first(t: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] → [T, H, D], a view."""
    return t[0].transpose(0, 1)


def _keys(t: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """The keys of all spans: [1, H, S, D] → [n, H, D]."""
    rows = _rows_first(t)
    if call.causal or len(call.spans) == 1:  # runs are contiguous from the first row on
        return rows[call.spans[0].k0 : call.spans[-1].k1]
    return torch.cat([rows[s.k0 : s.k1] for s in call.spans])
