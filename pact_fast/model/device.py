"""The device of a run, its free memory, and the precision of its computation."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pact_fast.config import Config
from pact_fast.errors import PactError


def device_kind(config: Config) -> str:
    """The setting `device` resolved to "cpu" or "cuda". Raises PactError if it is "cuda" and torch sees no GPU."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise PactError("device=cuda, but torch sees no GPU; use device=auto or install a CUDA build of torch")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def pick_device(config: Config) -> torch.device:
    """The torch device of this rank; a rank on GPUs has selected its own (`init_world`)."""
    return torch.device(device_kind(config))


def free_memory(device: torch.device) -> int:
    """Free memory in bytes; on CPU, the available memory divided by the number of ranks on the node."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(available.split()[1]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def release_memory() -> None:
    """Give freed memory of the CPU back to the system: glibc keeps free memory between blocks in use."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # not musl
        libc.malloc_trim(0)


def precision(config: Config, device: torch.device) -> AbstractContextManager:
    """The context for forward passes: autocast for `model.dtype=bfloat16`, whose weights stay fp32.

    Under ZeRO it does nothing: there the weights are bf16 themselves, with fp32 master weights in the optimizer.
    """
    if config.model.dtype == "bfloat16" and not uses_zero(config):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def uses_zero(config: Config) -> bool:
    """Whether DeepSpeed ZeRO partitions anything (stage 1, 2 or 3)."""
    return config.trainer.deepspeed is not None and config.trainer.deepspeed.stage > 0
