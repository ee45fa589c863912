"""Flash kernels behind two functions: forward gives (out, log-sum-exp), backward takes the merged ones.

A kernel runs one `Call`. What comes out has the call's rows in the order of its spans.
"""

from __future__ import annotations

from typing import Protocol

import torch

from pact_fast.batch.packing import Call


class Flash(Protocol):
    """q [1, Hq, T, D]; k, v [1, Hkv, T, D]."""

    def rows(self, call: Call) -> slice | torch.Tensor:
        """The rows of q that the call's results belong to."""
        ...

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [1, Hq, n, D], log-sum-exp [1, Hq, n])."""
        ...

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Call,
        scale: float,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
    ) -> None:
        """Add the call's share to dq, dk and dv. grad, out and lse are of all T rows, out and lse merged."""
        ...


def flash_for(q: torch.Tensor) -> Flash | None:
    """A kernel for one packed batch whose queries are like q; None: a dense mask has to serve."""
    if q.device.type == "cpu":
        return CpuFlash()
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256:
        from pact_fast.model.attention.flash_cuda import CudaFlash

        return CudaFlash(q.device)
    return None


class CpuFlash:
    """torch's flash attention for CPU, once per span, on row_shards: nothing is gathered."""

    def rows(self, call: Call) -> slice | torch.Tensor:
        whole = call.contiguous_rows()
        return whole if whole is not None else torch.cat([torch.arange(s.q0, s.q1) for s in call.spans])

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = sum(s.q1 - s.q0 for s in call.spans)
        # rows outermost, as the model's output projection reads them: it takes this memory, not a copy of it
        out = q.new_empty(1, n, q.shape[1], v.shape[-1]).transpose(1, 2)
        lse = q.new_empty(1, q.shape[1], n, dtype=torch.promote_types(q.dtype, torch.float32))
        row = 0
        for q0, q1, k0, k1 in call.spans:
            rows = slice(row, row + q1 - q0)
            out[:, :, rows], lse[:, :, rows] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], 0.0, call.causal, scale=scale
            )
            row = rows.stop
        return out, lse

    def backward(self, grad, q, k, v, out, lse, call, scale, dq, dk, dv):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for q0, q1, k0, k1 in call.spans:
            parts = flash(
                grad[:, :, q0:q1].contiguous(), q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1],
                out[:, :, q0:q1], lse[:, :, q0:q1], 0.0, call.causal, scale=scale,
            )  # fmt: skip
            dq[:, :, q0:q1] += parts[0]
            dk[:, :, k0:k1] += parts[1]
            dv[:, :, k0:k1] += parts[2]
