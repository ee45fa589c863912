"""The device of a run, its free memory and the precision of its computation."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from pact_fast.config import Config
from pact_fast.errors import PactError


def device_kind(config: Config) -> str:
    """ "cpu" or "cuda", as `device` says. PactError if CUDA is asked for and torch sees no GPU."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise PactError("device=cuda, but torch sees no GPU; use device=auto or install a CUDA build of torch")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def pick_device(config: Config) -> torch.device:
    return torch.device(device_kind(config))


def free_memory(device: torch.device) -> int:
    """Free memory in bytes; on CPU, this process's part of what the machine has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(available.split()[1]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def precision(config: Config, device: torch.device) -> AbstractContextManager:
    """Autocast context. bfloat16 is autocast over fp32 weights; under ZeRO the weights are bf16, with fp32 master weights."""
    if config.model.dtype == "bfloat16" and not uses_zero(config):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def uses_zero(config: Config) -> bool:
    return config.trainer.deepspeed is not None and config.trainer.deepspeed.stage > 0
