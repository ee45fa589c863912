"""The flash kernels that torch ships for CUDA (bf16 and fp16): one variable-length launch per call of a tree."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pact_fast.batch.packing import Call


class _Plan(NamedTuple):
    cu_q: torch.Tensor  # int32 [spans + 1]: where each span's rows begin among those of the call
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    rows: slice | torch.Tensor


def varlen_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: _Plan, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [Tq, Hq, D], log-sum-exp [Hq, Tq]) of q [Tq, Hq, D] and k, v [Tk, Hkv, D]."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, 0.0, causal, False, scale=scale
    )  # fmt: skip
    return out, lse


def varlen_backward(grad, q, k, v, out, lse, plan: _Plan, causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    """(dq, dk, dv) by the kernel's own backward, which takes out and log-sum-exp as given."""
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # random state of dropout, which there is not
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, 0.0, causal, unused, unused, scale=scale
    )  # fmt: skip


class CudaFlash:
    """For one packed batch on one device. Key ranges of a call are copied side by side where they are not already."""

    def __init__(self, device: torch.device):
        self._device = device
        self._plans: dict[int, _Plan] = {}  # id of a call's spans; every layer asks again

    def rows(self, call: Call) -> slice | torch.Tensor:
        return self._plan(call).rows

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan = self._plan(call)
        out, lse = varlen_forward(_packed(q)[plan.rows], _keys(k, call), _keys(v, call), plan, call.causal, scale)
        return out.transpose(0, 1)[None], lse[None]

    def backward(self, grad, q, k, v, out, lse, call, scale, dq, dk, dv):
        plan = self._plan(call)
        d_rows, d_keys, d_values = varlen_backward(
            _packed(grad)[plan.rows].contiguous(), _packed(q)[plan.rows], _keys(k, call), _keys(v, call),
            _packed(out)[plan.rows].contiguous(), lse[0, :, plan.rows].contiguous(), plan, call.causal, scale,
        )  # fmt: skip
        _packed(dq)[plan.rows] += d_rows
        start = 0
        for _, _, k0, k1 in call.spans:  # ranges may overlap: one after the other, in a fixed order
            part = slice(start, start + k1 - k0)
            _packed(dk)[k0:k1] += d_keys[part]
            _packed(dv)[k0:k1] += d_values[part]
            start = part.stop

    def _plan(self, call: Call) -> _Plan:
        plan = self._plans.get(id(call.spans))
        if plan is None:
            queries = [s.q1 - s.q0 for s in call.spans]
            keys = [s.k1 - s.k0 for s in call.spans]
            rows: Any = call.contiguous_rows()
            if rows is None:
                rows = torch.cat([torch.arange(s.q0, s.q1, device=self._device) for s in call.spans])
            plan = _Plan(self._ends(queries), self._ends(keys), max(queries), max(keys), rows)
            self._plans[id(call.spans)] = plan
        return plan

    def _ends(self, lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], device=self._device).cumsum(0).to(torch.int32)


def _packed(t: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] → [T, H, D], a view."""
    return t[0].transpose(0, 1)


def _keys(t: torch.Tensor, call: Call) -> torch.Tensor:
    """[keys of all spans, H, D] of [1, H, T, D]."""
    packed = _packed(t)
    if call.causal or len(call.spans) == 1:  # runs lie side by side from the first row on
        return packed[call.spans[0].k0 : call.spans[-1].k1]
    return torch.cat([packed[s.k0 : s.k1] for s in call.spans])
