"""The three GEMMs of the head, z = x·Wᵀ, dx = dz·W and dW = dzᵀ·x, with results in the accumulation dtype.

Logits rounded to bf16 would cost 0.03 nats of log-prob, and a weight gradient that is rounded once per chunk loses
precision with every chunk. GEMMs of bf16 and fp16 operands therefore return their fp32 accumulators.
"""

from __future__ import annotations

import math

import torch

from pact_fast.kernels.runtime.scratch import Scratch, padded_nbytes

CAST_ROWS = 2048  # rows of W converted to fp32 at a time, where 16-bit GEMMs with fp32 results are not available


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if one is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def autocast_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies hidden and weight, or None: as they are. fp64 is never cast."""
    device = hidden.device.type
    if accumulation_dtype(hidden, weight) == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class HeadGemms:
    """The GEMMs for weights in the accumulation dtype, by torch's BLAS. Subclasses: other dtypes and devices.

    W [V, D]; x [n, D] in `operand_dtype`; dz [m, V], a view from `dz_view`. dW accumulates over calls of `backward`.
    """

    scratch = 0  # bytes of working memory that `bind_scratch` takes

    def __init__(self, weight: torch.Tensor, needs_weight_grad: bool):
        self.weight = weight.detach()
        self.operand_dtype = self.weight.dtype  # of x
        self._needs_weight_grad = needs_weight_grad
        self._d_weight: torch.Tensor | None = None  # allocated by the first chunk

    def bind_scratch(self, scratch: Scratch) -> None:
        """Take `self.scratch` bytes of working memory; `scratch` must outlive this object's use."""

    def weight_grad(self) -> torch.Tensor | None:
        """dL/dW in the accumulation dtype, or already rounded to the dtype of W; None if not needed."""
        if self._d_weight is None and self._needs_weight_grad:
            return torch.zeros_like(self.weight, dtype=accumulation_dtype(self.weight))
        return self._d_weight

    def dz_view(self, z: torch.Tensor) -> torch.Tensor:
        """The output tensor for dz: z itself, or a view of its memory in a smaller dtype."""
        return z

    def scale(self, g: torch.Tensor) -> float:
        """A power of 2 by which the caller multiplies dz; `backward` divides its results by it."""
        return 1.0

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out [n, V] ← x·Wᵀ."""
        torch.mm(x, self.weight.t(), out=out)

    def backward(self, dz: torch.Tensor, x: torch.Tensor, scale: float, input_grad: bool) -> torch.Tensor | None:
        """Adds dzᵀ·x/scale to the weight gradient, if needed; returns dx = dz·W/scale [m, D] if `input_grad`."""
        self._add_weight_grad(dz, x)
        return torch.mm(dz, self.weight) if input_grad else None

    def _add_weight_grad(self, dz: torch.Tensor, x: torch.Tensor) -> None:
        if self._d_weight is not None:
            self._d_weight.addmm_(dz.t(), x)
        elif self._needs_weight_grad:
            self._d_weight = torch.mm(dz.t(), x)


class ChunkedCastGemms(HeadGemms):
    """16-bit weights on CPU, cast to fp32 in blocks of rows for each GEMM, never as a whole."""

    def __init__(self, weight: torch.Tensor, needs_weight_grad: bool):
        super().__init__(weight, needs_weight_grad)
        self.operand_dtype = torch.float32

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> None:
        for start in range(0, len(self.weight), CAST_ROWS):
            block = self.weight[start : start + CAST_ROWS].float()
            # into a block of columns: mm(out=) would copy, addmm(out=) writes through the stride
            torch.addmm(
                out[:, start : start + CAST_ROWS], x, block.t(), beta=0.0, out=out[:, start : start + CAST_ROWS]
            )

    def backward(self, dz: torch.Tensor, x: torch.Tensor, scale: float, input_grad: bool) -> torch.Tensor | None:
        self._add_weight_grad(dz, x)
        if not input_grad:
            return None
        dx = dz.new_zeros(len(dz), self.weight.shape[1])
        for start in range(0, len(self.weight), CAST_ROWS):
            dx.addmm_(dz[:, start : start + CAST_ROWS], self.weight[start : start + CAST_ROWS].float())
        return dx


class CpuFp32Gemms(HeadGemms):
    """fp32 weights on a CPU with AVX-512 (csrc/gemm_fp32.cpp)."""

    def __init__(self, weight: torch.Tensor, needs_weight_grad: bool):
        super().__init__(weight.contiguous(), needs_weight_grad)

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> None:
        torch.ops.pact_fast.fp32_logits(x.contiguous(), self.weight, out)

    def backward(self, dz: torch.Tensor, x: torch.Tensor, scale: float, input_grad: bool) -> torch.Tensor | None:
        dx = dz.new_empty(len(dz), self.weight.shape[1]) if input_grad else None
        add = self._d_weight is not None
        if self._needs_weight_grad and not add:
            self._d_weight = torch.empty_like(self.weight)
        torch.ops.pact_fast.fp32_grads(dz, x.contiguous(), self.weight, dx, self._d_weight, add)
        return dx


class CpuBf16Gemms(HeadGemms):
    """bf16 weights on a CPU with bf16 instructions (csrc/gemm_bf16.cpp). dz is rounded to bf16.

    dW accumulates in 24 bits (split accumulator): hi, the nearest bf16, and lo, the remainder as int8. hi is the result.
    """

    def __init__(self, weight: torch.Tensor, needs_weight_grad: bool):
        super().__init__(weight.contiguous(), needs_weight_grad)
        self.scratch = padded_nbytes(self.weight.shape, torch.int8) if needs_weight_grad else 0
        self._lo: torch.Tensor | None = None

    def bind_scratch(self, scratch: Scratch) -> None:
        if self._needs_weight_grad:
            self._lo = scratch.empty(self.weight.shape, torch.int8)

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> None:
        torch.ops.pact_fast.bf16_logits(x.contiguous(), self.weight, out)

    def backward(self, dz: torch.Tensor, x: torch.Tensor, scale: float, input_grad: bool) -> torch.Tensor | None:
        dx, *accumulators = self.grad_outputs(x, input_grad)
        torch.ops.pact_fast.bf16_grads(dz, x.contiguous(), self.weight, dx, *accumulators)
        return dx

    def grad_outputs(
        self, x: torch.Tensor, input_grad: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, bool]:
        """Output tensors (dx, dW hi, dW lo), None where not needed, and whether to add to dW (else overwrite it)."""
        dx = torch.empty(x.shape, dtype=torch.float32) if input_grad else None
        add = self._d_weight is not None
        if self._needs_weight_grad and not add:
            self._d_weight = torch.empty_like(self.weight)
        return dx, self._d_weight, self._lo, add


class CudaGemms(HeadGemms):
    """16-bit weights on CUDA: tensor cores with fp32 results; dz overwrites the front half of every row of z."""

    def dz_view(self, z: torch.Tensor) -> torch.Tensor:
        return z.view(self.operand_dtype)[:, : z.shape[1]]

    def scale(self, g: torch.Tensor) -> float:
        if self.operand_dtype != torch.float16 or not len(g):
            return 1.0
        # fp16 underflows below 6e-8: scale the largest coefficient near 1, or small ones vanish before any loss scaling
        largest = float(g.abs().max())
        return 2.0 ** -math.floor(math.log2(largest)) if 0.0 < largest < math.inf else 1.0

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=out)

    def backward(self, dz: torch.Tensor, x: torch.Tensor, scale: float, input_grad: bool) -> torch.Tensor | None:
        total = self._d_weight
        if total is not None:
            torch.addmm(total, dz.t(), x, out_dtype=torch.float32, alpha=1.0 / scale, out=total)
        elif self._needs_weight_grad:
            self._d_weight = torch.mm(dz.t(), x, out_dtype=torch.float32).div_(scale)
        return torch.mm(dz, self.weight, out_dtype=torch.float32).div_(scale) if input_grad else None


def make_gemms(backend: str, hidden: torch.Tensor, weight: torch.Tensor, needs_weight_grad: bool) -> HeadGemms:
    """The GEMMs for hidden [n, D] and weight [V, D]; if their dtypes differ, weight is cast to the wider one."""
    weight = weight.detach().to(torch.promote_types(hidden.dtype, weight.dtype))
    ops = torch.ops.pact_fast
    if weight.is_cuda and weight.dtype.itemsize == 2:
        return CudaGemms(weight, needs_weight_grad)
    if backend == "cpp" and weight.dtype == torch.float32 and ops.fp32_gemm_ready():
        return CpuFp32Gemms(weight, needs_weight_grad)
    if backend == "cpp" and weight.dtype == torch.bfloat16 and ops.bf16_gemm_ready():
        return CpuBf16Gemms(weight, needs_weight_grad)
    return (ChunkedCastGemms if weight.dtype.itemsize == 2 else HeadGemms)(weight, needs_weight_grad)
