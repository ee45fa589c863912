"""The three matrix products of the head, x·Wᵀ, dz·W and dzᵀ·x, with results in the accumulation dtype.

Logits rounded to bf16 would cost 0.03 nats of log-prob, and a weight gradient that is rounded once per chunk loses digits
with every chunk. So products of bf16 and fp16 leave their fp32 accumulator as fp32, whatever the device offers for it.
"""

from __future__ import annotations

import math

import torch

from pact_fast.kernels.runtime.scratch import Scratch, padded_nbytes

BLOCK = 2048  # rows of W converted at a time, where the device has no product of 16-bit numbers with an fp32 result


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if one is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class HeadGemms:
    """For weights in the accumulation dtype. W [V, D]; x [n, D] in the dtype `operand`, dz [m, V] as `dz_view` says."""

    scratch = 0  # bytes wanted, see `take`

    def __init__(self, weight: torch.Tensor, needs_weight_grad: bool):
        self.weight = weight.detach()
        self.operand = self.weight.dtype  # of x
        self._needs_weight_grad = needs_weight_grad
        self._d_weight: torch.Tensor | None = None  # grows by chunks from the first one on

    def take(self, scratch: Scratch) -> None:
        """Memory that lasts as long as these products are used."""

    def weight_grad(self) -> torch.Tensor | None:
        """dL/dW in the accumulation dtype, or rounded already to that of W; None if not wanted."""
        if self._d_weight is None and self._needs_weight_grad:
            return torch.zeros_like(self.weight, dtype=accumulation_dtype(self.weight))
        return self._d_weight

    def dz_view(self, z: torch.Tensor) -> torch.Tensor:
        """Where dz is to be written: z itself, or a view of its memory in a smaller dtype."""
        return z

    def scale(self, g: torch.Tensor) -> float:
        """A power of 2 that dz is to be multiplied with; the products divide by it."""
        return 1.0

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out [n, V] ← x·Wᵀ."""
        torch.mm(x, self.weight.t(), out=out)

    def backward(self, dz: torch.Tensor, x: torch.Tensor, scale: float, input_grad: bool) -> torch.Tensor | None:
        """The weight gradient grows by dzᵀ·x/scale, if wanted; returns dz·W/scale [m, D], if `input_grad`."""
        self._add_weight_grad(dz, x)
        return torch.mm(dz, self.weight) if input_grad else None

    def _add_weight_grad(self, dz: torch.Tensor, x: torch.Tensor) -> None:
        if self._d_weight is not None:
            self._d_weight.addmm_(dz.t(), x)
        elif self._needs_weight_grad:
            self._d_weight = torch.mm(dz.t(), x)


class ChunkedCastGemms(HeadGemms):
    """16-bit weights on CPU: blocks of W are converted to fp32 for each product, never all of it."""

    def __init__(self, weight: torch.Tensor, needs_weight_grad: bool):
        super().__init__(weight, needs_weight_grad)
        self.operand = torch.float32

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> None:
        for start in range(0, len(self.weight), BLOCK):
            block = self.weight[start : start + BLOCK].float()
            # into a block of columns: mm's out= would copy, addmm's accumulation writes through the stride
            torch.addmm(out[:, start : start + BLOCK], x, block.t(), beta=0.0, out=out[:, start : start + BLOCK])

    def backward(self, dz: torch.Tensor, x: torch.Tensor, scale: float, input_grad: bool) -> torch.Tensor | None:
        self._add_weight_grad(dz, x)
        if not input_grad:
            return None
        dx = dz.new_zeros(len(dz), self.weight.shape[1])
        for start in range(0, len(self.weight), BLOCK):
            dx.addmm_(dz[:, start : start + BLOCK], self.weight[start : start + BLOCK].float())
        return dx


class CpuFp32Products(HeadGemms):
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

    The weight gradient grows in 24 bits, the nearest bf16 number and an int8 of what it lacks: the former is the result.
    """

    def __init__(self, weight: torch.Tensor, needs_weight_grad: bool):
        super().__init__(weight.contiguous(), needs_weight_grad)
        self.scratch = padded_nbytes(self.weight.shape, torch.int8) if needs_weight_grad else 0
        self._lo: torch.Tensor | None = None

    def take(self, scratch: Scratch) -> None:
        if self._needs_weight_grad:
            self._lo = scratch.empty(self.weight.shape, torch.int8)

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> None:
        torch.ops.pact_fast.bf16_logits(x.contiguous(), self.weight, out)

    def backward(self, dz: torch.Tensor, x: torch.Tensor, scale: float, input_grad: bool) -> torch.Tensor | None:
        dx, *sums = self.results(x, input_grad)
        torch.ops.pact_fast.bf16_grads(dz, x.contiguous(), self.weight, dx, *sums)
        return dx

    def results(
        self, x: torch.Tensor, input_grad: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, bool]:
        """Where the gradients of these rows are to be written, (dx, dW, its rest), and whether dW is to grow."""
        dx = torch.empty(x.shape, dtype=torch.float32) if input_grad else None
        add = self._d_weight is not None
        if self._needs_weight_grad and not add:
            self._d_weight = torch.empty_like(self.weight)
        return dx, self._d_weight, self._lo, add


class CudaProducts(HeadGemms):
    """16-bit weights on CUDA: tensor cores with fp32 results; dz takes the front half of every row of z."""

    def dz_view(self, z: torch.Tensor) -> torch.Tensor:
        return z.view(self.operand)[:, : z.shape[1]]

    def scale(self, g: torch.Tensor) -> float:
        if self.operand != torch.float16 or not len(g):
            return 1.0
        # fp16 ends at 6e-8: bring the largest coefficient near 1, or small ones vanish before any loss scaling
        top = float(g.abs().max())
        return 2.0 ** -math.floor(math.log2(top)) if 0.0 < top < math.inf else 1.0

    def logits(self, x: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, self.weight.t(), out_dtype=torch.float32, out=out)

    def backward(self, dz: torch.Tensor, x: torch.Tensor, scale: float, input_grad: bool) -> torch.Tensor | None:
        total = self._d_weight
        if total is not None:
            torch.addmm(total, dz.t(), x, out_dtype=torch.float32, alpha=1.0 / scale, out=total)
        elif self._needs_weight_grad:
            self._d_weight = torch.mm(dz.t(), x, out_dtype=torch.float32).div_(scale)
        return torch.mm(dz, self.weight, out_dtype=torch.float32).div_(scale) if input_grad else None


def products(backend: str, hidden: torch.Tensor, weight: torch.Tensor, needs_weight_grad: bool) -> HeadGemms:
    """The products for these tensors; if their dtypes differ, the wider one counts."""
    weight = weight.detach().to(torch.promote_types(hidden.dtype, weight.dtype))
    ops = torch.ops.pact_fast
    if weight.is_cuda and weight.dtype.itemsize == 2:
        return CudaProducts(weight, needs_weight_grad)
    if backend == "cpp" and weight.dtype == torch.float32 and ops.fp32_gemm_ready():
        return CpuFp32Products(weight, needs_weight_grad)
    if backend == "cpp" and weight.dtype == torch.bfloat16 and ops.bf16_gemm_ready():
        return CpuBf16Gemms(weight, needs_weight_grad)
    return (ChunkedCastGemms if weight.dtype.itemsize == 2 else HeadGemms)(weight, needs_weight_grad)
