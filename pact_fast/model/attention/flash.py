"""Dense flash-attention kernels for one `AttentionCall` of a pack: the interface, and torch's kernel for CPU.

Tree attention merges the results of several calls, so forward returns the log-sum-exp with the output, and backward
takes the merged output and the merged log-sum-exp.
"""

from __future__ import annotations

from typing import Protocol

import torch

from pact_fast.batch.packing import AttentionCall


class FlashKernel(Protocol):
    """Computes calls of one packed batch. q [1, Hq, T, D]; k, v [1, Hkv, S, D].

    windows  whether the kernel knows sliding windows, see window_cuda.py
    """

    windows: bool

    def rows(self, call: AttentionCall) -> slice | torch.Tensor:
        """The n query rows of the call, in the order of its spans; int64 [n] if they are not contiguous."""
        ...

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [1, Hq, n, D], log-sum-exp [1, Hq, n]) of the call's query rows."""
        ...

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: AttentionCall,
        scale: float,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
    ) -> None:
        """Add the call's contribution to dq, dk and dv.

        Args:
            grad: [1, Hq, T, D], gradient of the merged output.
            q, k, v, call, scale: As in forward.
            out: [1, Hq, T, D], the merged output.
            lse: [1, Hq, T], the merged log-sum-exp.
            dq, dk, dv: Accumulators of the shapes of q, k and v, in the dtype of lse.
        """
        ...


def select_flash_kernel(q: torch.Tensor) -> FlashKernel | None:
    """A kernel for one packed batch with queries of q's device, dtype and width; None if there is none."""
    if q.device.type == "cpu":
        return CpuFlash()
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256:
        from pact_fast.model.attention.flash_cuda import CudaFlash

        return CudaFlash(q.device)
    return None


class CpuFlash:
    """torch's flash attention for CPU, once per span, on slices of q, k and v without copies."""

    windows = False

    def rows(self, call: AttentionCall) -> slice | torch.Tensor:
        whole = call.contiguous_rows()
        return whole if whole is not None else torch.cat([torch.arange(s.q0, s.q1) for s in call.spans])

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = sum(s.q1 - s.q0 for s in call.spans)
        # rows outermost: the layout that the output projection reads, so that it does not copy
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
