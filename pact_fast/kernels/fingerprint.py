"""Fingerprints of weights: 64 bits of a tensor, the same from every backend, on every device, and in every cut.

    h = Σ bits_ij·a_i·b_j mod 2⁶⁴,   a, b: odd pseudo-random integers, functions of the place in the whole tensor

The sum of the fingerprints of a tensor's blocks is that of the tensor, so an engine may hold it split over devices. In
C++ and Triton it takes one pass over memory; in torch, blocks that fit into the cache.
"""

from __future__ import annotations

import functools
import zlib

import torch

from pact_fast.kernels.runtime.backends import resolve

MASK = (1 << 64) - 1
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes of an element; larger ones are several int32
ROW_SALT = 1
CPU_BLOCK = 1 << 16  # elements in int64 at a time: 512 KiB, which stay in the L2 cache
CUDA_BLOCK = 1 << 23  # 64 MiB; smaller ones would take longer to launch than to compute


def fingerprint(tensor: torch.Tensor, row: int = 0, col: int = 0, *, backend: str = "auto") -> int:
    """Hash of the bits of a tensor [rows, …], viewed as a matrix, and of their places in the whole matrix.

    A change of one element always changes it, because a and b are odd. Changes of several go unnoticed with a
    probability of about 2⁻⁶⁰, or 2⁻³² if they are changes of fp32 signs alone. Zeros add nothing. It detects faults,
    not tampering.

    Args:
        tensor: The block, with any strides; any dtype, on which b depends, too.
        row: Its first row in the whole matrix.
        col: Its first column in the whole matrix.
        backend: One of `backends()`, or "auto" for the fastest on the tensor's device.
    """
    bits = _matrix(tensor)
    if not bits.numel():
        return 0
    a = coefficients(row, len(bits), bits.device, ROW_SALT)
    first = col * tensor.element_size() // bits.element_size()
    b = coefficients(first, bits.shape[1], bits.device, dtype_salt(tensor.dtype))
    if (bits.stride(0) == 1 and bits.stride(1) != 1) or bits.shape[1] == 1:
        bits, a, b = bits.t(), b, a  # rows and columns have equal parts in the sum
    if bits.stride(1) != 1:
        bits = bits.contiguous()
    return int(_SUMS[resolve(backend, bits.device, bits.dtype)](bits, a, b)) & MASK


@functools.lru_cache(maxsize=64)  # layers have the same few shapes
def coefficients(start: int, count: int, device: torch.device, salt: int) -> torch.Tensor:
    """Odd int64 [count] computed from the indices by splitmix64, so that they are the same on every machine."""
    x = torch.arange(start + 1, start + count + 1, device=device).mul_(_signed(0x9E3779B97F4A7C15 * salt))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x | 1


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


@functools.cache
def dtype_salt(dtype: torch.dtype) -> int:
    """Makes equal bits of different dtypes different numbers; large, so that no row and column have one coefficient."""
    return zlib.crc32(str(dtype).encode()) << 1 | 1


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as integers [rows, columns]; a copy only where strides leave no other way."""
    tensor = tensor.detach()
    matrix = tensor.reshape(len(tensor), tensor[:1].numel()) if tensor.ndim else tensor.reshape(1, 1)
    if matrix.element_size() in INTEGERS:
        return matrix.view(INTEGERS[matrix.element_size()])
    # Signs of 8-byte elements would be the highest bits of the sum: two changes would cancel
    return matrix.contiguous().view(torch.int32)


def _sum_torch(bits: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    step = max(1, (CPU_BLOCK if bits.device.type == "cpu" else CUDA_BLOCK) // bits.shape[1])
    buffer = bits.new_empty(min(step, len(bits)), bits.shape[1], dtype=torch.int64)
    sums = torch.empty_like(a)
    for start in range(0, len(bits), step):
        block = bits[start : start + step]
        torch.sum(buffer[: len(block)].copy_(block).mul_(b), 1, out=sums[start : start + step])
    return sums.mul_(a).sum()


def _sum_cpp(bits: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    sums = torch.empty_like(a)
    torch.ops.pact_fast.fingerprint(bits, a, b, sums)
    return sums.sum()


def _sum_triton(bits: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from pact_fast.kernels.fingerprint_triton import row_block_sums

    return row_block_sums(bits, a, b).sum()


_SUMS = {"torch": _sum_torch, "cpp": _sum_cpp, "triton": _sum_triton}  # backend → Σ bits_ij·a_i·b_j as int64 []
