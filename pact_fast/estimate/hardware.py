"""Rates of a device: measured on this machine, or the published peaks of named GPUs times assumed efficiencies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from pact_fast.errors import PactError
from pact_fast.estimate.workload import path_batch
from pact_fast.model.attention.tree import TreeLayout, tree_attention

TERA, GIGA = 1e12, 1e9
# fractions of published peaks that a training run is assumed to reach; none was measured
MATMUL, ATTENTION, MEMORY, LINK = 0.6, 0.4, 0.75, 0.7
SOURCE = (
    f"GPU rates are published peaks times assumed efficiencies (matrix products {MATMUL:.0%}, attention "
    f"{ATTENTION:.0%}, memory {MEMORY:.0%}, links {LINK:.0%}); nothing here was measured on it"
)
ROUNDS, SECONDS = 3, 1.0  # least repetitions, and least time, of each kernel when this machine is measured


@dataclass(frozen=True)
class Hardware:
    """Sustained rates of one device.

    name       for display
    device     "cpu" or "cuda"
    matmul     FLOP/s of matrix products
    attention  FLOP/s of attention
    memory     bytes/s of memory traffic
    capacity   bytes of memory
    link       bytes/s to devices of the same node
    network    bytes/s to other nodes
    node       devices per node
    source     where the rates come from, for display
    """

    name: str
    device: str
    matmul: float
    attention: float
    memory: float
    capacity: int
    link: float
    network: float
    node: int
    source: str


@dataclass(frozen=True)
class _Peak:
    """Published peaks: dense bf16 FLOP/s, memory bytes/s, bytes of memory, NVLink and network bytes/s per direction."""

    flops: float
    memory: float
    capacity: float
    link: float
    network: float


PEAKS = {
    "a100": _Peak(312 * TERA, 2039 * GIGA, 80 * GIGA, 300 * GIGA, 25 * GIGA),
    "h100": _Peak(989 * TERA, 3350 * GIGA, 80 * GIGA, 450 * GIGA, 50 * GIGA),
    "h200": _Peak(989 * TERA, 4800 * GIGA, 141 * GIGA, 450 * GIGA, 50 * GIGA),
    "b200": _Peak(2250 * TERA, 8000 * GIGA, 180 * GIGA, 900 * GIGA, 50 * GIGA),
}
NAMES = (*PEAKS, "this")


def named(name: str) -> Hardware:
    """Rates of a GPU in PEAKS, at the assumed efficiencies. PactError for other names."""
    if name not in PEAKS:
        raise PactError(f"--gpu {name}: unknown; choose one of {', '.join(NAMES)}")
    p = PEAKS[name]
    return Hardware(
        name, "cuda", p.flops * MATMUL, p.flops * ATTENTION, p.memory * MEMORY, int(p.capacity),
        p.link * LINK, p.network * LINK, 8, SOURCE,
    )  # fmt: skip


def measured(model: PretrainedConfig, dtype: torch.dtype, tokens: int) -> Hardware:
    """Rates of this machine, measured for a few seconds with kernels of the model's shapes.

    Args:
        model: Architecture that gives the shapes.
        dtype: Type of the matrix products and attention.
        tokens: Tokens of the kernels' inputs (bounded to 256 … 2048).
    """
    cuda = torch.cuda.is_available()
    device, config = torch.device("cuda" if cuda else "cpu"), model.get_text_config()
    tokens = max(256, min(tokens, 2048))
    memory = _memory_rate(device, tokens, config)
    if cuda:
        capacity, name = torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0)
    else:
        capacity, name = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _cpu_name()
    return Hardware(
        name, device.type, _matmul_rate(device, dtype, tokens, config), _attention_rate(device, dtype, tokens, config),
        memory, capacity, memory, memory, 1, "rates were measured here with kernels of the model's shapes",
    )  # fmt: skip


def _matmul_rate(device: torch.device, dtype: torch.dtype, tokens: int, config: PretrainedConfig) -> float:
    """FLOP/s of an MLP layer's three matrix products (forward, and both of the backward pass)."""
    width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    x, w, y = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((tokens, width), (inner, width), (tokens, inner))
    )
    seconds = _seconds(lambda: (x @ w.t(), y @ w, y.t() @ x), device)
    return 6.0 * tokens * width * inner / seconds


def _attention_rate(device: torch.device, dtype: torch.dtype, tokens: int, config: PretrainedConfig) -> float:
    """FLOP/s of causal attention, forward and backward, at 12 FLOPs per query-key pair, head and channel."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    layout = TreeLayout(path_batch(tokens), device)
    q, k, v = (
        torch.randn(1, h, tokens, width, device=device, dtype=dtype, requires_grad=True) for h in (heads, kv, kv)
    )
    grad = torch.randn(q.shape, device=device, dtype=dtype)
    seconds = _seconds(lambda: tree_attention(q, k, v, layout, scale=width**-0.5).backward(grad), device)
    return 12.0 * heads * width * tokens * (tokens + 1) / 2 / seconds


def _memory_rate(device: torch.device, tokens: int, config: PretrainedConfig) -> float:
    """Bytes/s of an elementwise product that allocates its result, as a model's pointwise operators do."""
    shape = tokens, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    x, y = torch.ones(shape, device=device), torch.ones(shape, device=device)
    return 3.0 * x.numel() * 4 / _seconds(lambda: x * y, device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: median over rounds, after a warm-up call."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < ROUNDS or (time.perf_counter() - begin < SECONDS and len(times) < 50):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"
